package snapshot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/config"
)

// attempts limits how often a request is sent. A scheduled snapshot is tried again later, and a user waits for the answer.
const attempts = 3

// Bucket is a folder in S3 with snapshots.
type Bucket struct {
	settings config.S3
	client   *minio.Client
}

// NewBucket returns the bucket. It does not connect.
func NewBucket(s config.S3) (*Bucket, error) {
	transport, err := minio.DefaultTransport(!s.Insecure)
	if err != nil {
		return nil, err
	}
	if !s.Insecure {
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: s.SkipVerify}
		if s.CAFile != "" {
			text, err := os.ReadFile(s.CAFile)
			if err != nil {
				return nil, fmt.Errorf("--s3-endpoint-ca: %w", err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(text) {
				return nil, fmt.Errorf("--s3-endpoint-ca: %s has no certificate", s.CAFile)
			}
			transport.TLSClientConfig.RootCAs = pool
		}
	}
	identity := credentials.NewStaticV4(s.AccessKey, s.SecretKey, "")
	if s.AccessKey == "" {
		identity = credentials.NewChainCredentials([]credentials.Provider{&credentials.EnvAWS{}, &credentials.IAM{}})
	}
	client, err := minio.New(s.Endpoint, &minio.Options{Creds: identity, Secure: !s.Insecure, Transport: transport, Region: s.Region, MaxRetries: attempts})
	if err != nil {
		return nil, fmt.Errorf("--s3-endpoint %s: %w", s.Endpoint, err)
	}
	return &Bucket{s, client}, nil
}

// URL returns the URL of a snapshot, for people.
func (b *Bucket) url(file string) string { return "s3://" + b.settings.Bucket + "/" + b.key(file) }

func (b *Bucket) key(file string) string { return path.Join(b.settings.Folder, file) }

// upload copies a snapshot into the bucket.
func (b *Bucket) upload(ctx context.Context, from, file string) error {
	ctx, cancel := context.WithTimeout(ctx, b.settings.Timeout)
	defer cancel()
	done, err := b.client.FPutObject(ctx, b.settings.Bucket, b.key(file), from, minio.PutObjectOptions{ContentType: "application/octet-stream"})
	if err != nil {
		return b.failed("upload", file, err)
	}
	if info, err := os.Stat(from); err != nil || info.Size() != done.Size {
		return b.failed("upload", file, errors.Join(err, fmt.Errorf("%d bytes arrived", done.Size)))
	}
	return nil
}

// list returns the snapshots in the folder, but not in those below it.
func (b *Bucket) list(ctx context.Context) (all []Info, err error) {
	ctx, cancel := context.WithTimeout(ctx, b.settings.Timeout)
	defer cancel()
	prefix := b.settings.Folder
	if prefix != "" {
		prefix += "/"
	}
	for object := range b.client.ListObjects(ctx, b.settings.Bucket, minio.ListObjectsOptions{Prefix: prefix}) {
		if object.Err != nil {
			return all, b.failed("list", "", object.Err)
		}
		file := path.Base(object.Key)
		p, ok := parse(file)
		if !ok || object.Key != b.key(file) {
			continue
		}
		all = append(all, p.info(S3, b.url(file), object.Size))
	}
	return all, nil
}

// remove removes a snapshot.
func (b *Bucket) remove(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, b.settings.Timeout)
	defer cancel()
	if err := b.client.RemoveObject(ctx, b.settings.Bucket, b.key(file), minio.RemoveObjectOptions{}); err != nil {
		return b.failed("remove", file, err)
	}
	return nil
}

// download copies a snapshot out of the bucket. The file has its name once it is complete.
func (b *Bucket) download(ctx context.Context, file, to string) error {
	ctx, cancel := context.WithTimeout(ctx, b.settings.Timeout)
	defer cancel()
	object, err := b.client.GetObject(ctx, b.settings.Bucket, b.key(file), minio.GetObjectOptions{})
	if err != nil {
		return b.failed("download", file, err)
	}
	defer object.Close()
	info, err := object.Stat()
	if err != nil {
		return b.failed("download", file, err)
	}
	out, err := atomicfile.Create(to, 0o600)
	if err != nil {
		return err
	}
	defer out.Discard()
	// The announced size, and the room for it, bound what a server can send.
	free, err := freeSpace(path.Dir(to))
	if err != nil {
		return err
	}
	if info.Size > free {
		return b.failed("download", file, fmt.Errorf("it has %d MiB, and %s has room for %d: free some", info.Size>>20, path.Dir(to), free>>20))
	}
	if copied, err := io.Copy(out, io.LimitReader(object, info.Size+1)); err != nil || copied != info.Size {
		return b.failed("download", file, errors.Join(err, fmt.Errorf("%d of %d bytes arrived", copied, info.Size)))
	}
	return out.Commit()
}

func (b *Bucket) failed(what, file string, err error) error {
	if file == "" {
		return fmt.Errorf("%s the snapshots in S3 (bucket %s at %s): %w", what, b.settings.Bucket, b.settings.Endpoint, err)
	}
	return fmt.Errorf("%s %s in S3 (bucket %s at %s): %w", what, file, b.settings.Bucket, b.settings.Endpoint, err)
}
