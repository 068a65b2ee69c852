package snapshot

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/porttest"
)

// s3Server starts a real S3 server with TLS, and returns the settings of a bucket in it. The server's program is POLYMESH_S3_SERVER, or
// the result of `make .build/test/versitygw`.
func s3Server(t *testing.T) config.S3 {
	t.Helper()
	program := os.Getenv("POLYMESH_S3_SERVER")
	if program == "" {
		path, err := filepath.Abs("../../../.build/test/versitygw")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Skipf("no S3 server: set POLYMESH_S3_SERVER or run make .build/test/versitygw (%v)", err)
		}
		program = path
	}
	dir := t.TempDir()
	ca, key := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "key.pem")
	writeCertificate(t, ca, key)
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	address := porttest.Loopback(t).String()
	cmd := exec.Command(program, "--port", address, "--cert", ca, "--key", key, "--quiet", "posix", data)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY=access", "ROOT_SECRET_KEY=hunter2hunter2")
	cmd.Dir = dir
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	s := config.S3{Endpoint: address, Bucket: "backups", Region: "us-east-1", Folder: "clusters/a", AccessKey: "access", SecretKey: "hunter2hunter2", CAFile: ca, Timeout: time.Minute}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := bucketOf(t, s).client.MakeBucket(ctx, s.Bucket, minio.MakeBucketOptions{})
		if err == nil {
			return s
		}
		if ctx.Err() != nil {
			t.Fatalf("the S3 server does not respond: %v", err)
		}
	}
}

func writeCertificate(t *testing.T, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "s3"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func bucketOf(t *testing.T, s config.S3) *Bucket {
	t.Helper()
	b, err := NewBucket(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Snapshots in a real S3 server: saved, listed next to the local ones, kept by number for each node and folder, restored on another machine,
// removed.
func TestS3(t *testing.T) {
	t.Parallel()
	settings := s3Server(t)
	m := newCluster(t, "n1")
	m.o.Bucket = bucketOf(t, settings)
	first := m.save(t, Scheduled)
	second, third := m.save(t, Scheduled), m.save(t, Scheduled)
	other := machine{New(m.o), m.dir}
	other.o.Node = "n2"
	theirs := other.save(t, Scheduled)
	elsewhere := settings
	elsewhere.Folder = "clusters/a/b"
	below := machine{New(m.o), m.dir}
	below.o.Bucket = bucketOf(t, elsewhere)
	below.save(t, Scheduled)
	if _, err := m.o.Bucket.client.PutObject(t.Context(), settings.Bucket, settings.Folder+"/letter.txt", strings.NewReader("x"), 1, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	remote := func() (names []string) {
		t.Helper()
		all, err := m.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			if i.Location == S3 {
				names = append(names, i.File)
				if i.Size == 0 || i.Path != "s3://backups/clusters/a/"+i.File {
					t.Errorf("%+v", i)
				}
			}
		}
		return names
	}
	if got, want := remote(), []string{theirs.File, third.File, second.File, first.File}; !slices.Equal(got, want) {
		t.Errorf("in S3 are %q, want %q", got, want)
	}
	if _, err := m.Prune(t.Context(), 2, Scheduled); err != nil {
		t.Fatal(err)
	}
	if got, want := remote(), []string{theirs.File, third.File, second.File}; !slices.Equal(got, want) {
		t.Errorf("after pruning there are %q, want %q", got, want)
	}

	fresh := newMachine(t, "n3")
	fresh.o.Bucket = bucketOf(t, settings)
	if _, err := fresh.Restore(t.Context(), third.File); err != nil {
		t.Fatal(err)
	}
	if text, _ := fresh.values(t); text != "a=1 " {
		t.Errorf("restored %q", text)
	}
	if _, err := fresh.Restore(t.Context(), first.File); err == nil {
		t.Error("a snapshot that was removed is restored")
	}
	removed, err := m.Delete(t.Context(), third.File)
	if err != nil || len(removed) != 2 {
		t.Errorf("removed %v, %v", removed, err)
	}
	if got, want := remote(), []string{theirs.File, second.File}; !slices.Equal(got, want) {
		t.Errorf("after deleting there are %q, want %q", got, want)
	}

	// A snapshot that does not reach S3 is still one, and the user learns of it.
	for what, change := range map[string]func(*config.S3){
		"wrong secret":      func(s *config.S3) { s.SecretKey = "wrong" },
		"no bucket":         func(s *config.S3) { s.Bucket = "none" },
		"unknown authority": func(s *config.S3) { s.CAFile = "" },
		"no TLS":            func(s *config.S3) { s.Insecure = true },
	} {
		t.Run(what, func(t *testing.T) {
			bad := settings
			change(&bad)
			bad.Timeout = 3 * time.Second
			c := machine{New(m.o), m.dir}
			c.o.Bucket = bucketOf(t, bad)
			info, err := c.Save(t.Context(), "on-demand")
			if err == nil || info == nil || !strings.Contains(err.Error(), "not in S3") || strings.Contains(err.Error(), bad.SecretKey) {
				t.Fatalf("%+v, %v", info, err)
			}
			if _, err := os.Stat(info.Path); err != nil {
				t.Error(err)
			}
			all, err := c.List(t.Context())
			if err == nil || !slices.ContainsFunc(all, func(i Info) bool { return i.File == info.File }) {
				t.Errorf("listed %v, %v", all, err)
			}
			missing := "on-demand_n1_20200101T000000.000Z.tar.zst"
			if _, err := c.Restore(t.Context(), missing); err == nil {
				t.Error("it restores what is not there")
			}
			if _, err := os.Stat(filepath.Join(c.o.Dir, missing)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("half a download: %v", err)
			}
		})
	}
	t.Run("certificate not checked", func(t *testing.T) {
		s := settings
		s.CAFile, s.SkipVerify = "", true
		if _, err := bucketOf(t, s).list(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
