package snapshot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
)

const (
	// workFactor is log2 of scrypt's N: 128 MiB of memory, the first of the parameters in OWASP's Password Storage Cheat Sheet.
	workFactor = 17
	// maxWorkFactor limits what someone else's archive can cost before its passphrase is known to be right: 1 GiB.
	maxWorkFactor = 20
	// window is the most memory that an archive's decompression may need: that of zstd's highest usual level.
	window = 32 << 20
)

// ErrPassphrase means that an archive is encrypted, and that the passphrase is missing or wrong.
var ErrPassphrase = errors.New("it is encrypted")

// compressor returns a writer for the content of an archive, which is compressed, and encrypted if there is a passphrase. The
// caller closes it.
func compressor(w io.Writer, passphrase string) (io.WriteCloser, error) {
	var sealed io.WriteCloser
	if passphrase != "" {
		recipient, err := age.NewScryptRecipient(passphrase)
		if err != nil {
			return nil, err
		}
		recipient.SetWorkFactor(workFactor)
		if sealed, err = age.Encrypt(w, recipient); err != nil {
			return nil, err
		}
		w = sealed
	}
	packed, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	return &layers{packed, sealed}, nil
}

type layers struct {
	*zstd.Encoder
	sealed io.WriteCloser // nil if not encrypted
}

func (l *layers) Close() error {
	err := l.Encoder.Close()
	if l.sealed != nil {
		// An age file without its last chunk is not accepted, so this must not be skipped.
		err = errors.Join(err, l.sealed.Close())
	}
	return err
}

// decompressor returns the content of an archive. Its reader returns an error if a byte of an encrypted archive was changed.
func decompressor(r io.Reader, passphrase string) (*zstd.Decoder, error) {
	buffered := bufio.NewReader(r)
	// https://age-encryption.org/v1
	intro, err := buffered.Peek(len(ageIntro))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	r = buffered
	if bytes.Equal(intro, []byte(ageIntro)) {
		if passphrase == "" {
			return nil, fmt.Errorf("%w: give its passphrase with --snapshot-passphrase-file, or the variable %s", ErrPassphrase, PassphraseVariable)
		}
		identity, err := age.NewScryptIdentity(passphrase)
		if err != nil {
			return nil, err
		}
		identity.SetMaxWorkFactor(maxWorkFactor)
		if r, err = age.Decrypt(buffered, identity); err != nil {
			return nil, fmt.Errorf("%w with another passphrase, or is damaged: %w", ErrPassphrase, err)
		}
	}
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(window))
}

const ageIntro = "age-encryption.org/v1\n"

// PassphraseVariable is the environment variable with the passphrase of snapshots.
const PassphraseVariable = "POLYMESH_SNAPSHOT_PASSPHRASE"
