package join

import (
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	clientcertificate "k8s.io/client-go/util/certificate"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/layout"
)

func TestRecords(t *testing.T) {
	_, certs := cluster(t)
	cert := func(at time.Time) *x509.Certificate {
		c, err := x509.ParseCertificate(certified(t, certs, "system:node:worker", newKey(t), at))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	at := func(d time.Duration) string { return now.Add(d).Format(time.RFC3339Nano) }
	for what, c := range map[string]struct {
		data        map[string]string
		free        bool
		voidedUntil time.Duration // of certificates, from now
	}{
		"joined":           {map[string]string{"time": at(0)}, false, -time.Hour},
		"registered":       {map[string]string{"time": at(0), "node": "a"}, false, -time.Hour},
		"removed":          {map[string]string{"time": at(0), "node": "a", "removed": at(time.Hour)}, true, time.Hour},
		"joined again":     {map[string]string{"time": at(2 * time.Hour), "removed": at(time.Hour)}, false, time.Hour},
		"registered again": {map[string]string{"time": at(2 * time.Hour), "node": "b", "removed": at(time.Hour)}, false, time.Hour},
		"damaged":          {map[string]string{"time": "yesterday", "removed": "yesterday"}, false, -time.Hour},
		"empty":            {nil, false, -time.Hour},
	} {
		r := readRecord(&corev1.ConfigMap{Data: c.data})
		if r.free() != c.free {
			t.Errorf("%s: the name is free: %t", what, r.free())
		}
		for _, made := range []time.Duration{0, time.Hour - time.Second, time.Hour, 2 * time.Hour} {
			if want := made < c.voidedUntil; r.void(cert(now.Add(made))) != want {
				t.Errorf("%s: a certificate of %s later is void: %t", what, made, !want)
			}
		}
	}
}

// A machine whose node was removed has the certificate and the key of before. They do not make it the node that has its name now.
func TestRemovedCertificateProvesNothing(t *testing.T) {
	view, certs := cluster(t)
	key := newKey(t)
	r := Request{
		NodeName: "worker", NodeIP: netip.MustParseAddr("192.0.2.2"), Version: view.Version, Now: now, ClientCSR: csr(t, key), ServingCSR: csr(t, newKey(t)),
		Certificate: certified(t, certs, "system:node:worker", key, now.Add(-time.Hour)),
	}
	if _, refused := Decide(r, view); refused != nil {
		t.Fatal(refused)
	}
	view.Record = &corev1.ConfigMap{Data: map[string]string{"time": now.Add(-time.Minute).Format(time.RFC3339Nano), "removed": now.Add(-2 * time.Minute).Format(time.RFC3339Nano)}}
	if _, refused := Decide(r, view); refused == nil {
		t.Error("it takes the place of the node that has its name now")
	}
}

// client-go's store removes the link to the certificate in use before it makes the next one.
func TestInterruptedRenewal(t *testing.T) {
	_, certs := cluster(t)
	for how, crash := range map[string]func(dir string) error{
		"before the link is renamed": func(dir string) error {
			return os.Rename(filepath.Join(dir, "kubelet-client-current.pem"), filepath.Join(dir, "kubelet-client-updated.pem"))
		},
		"without a link": func(dir string) error { return os.Remove(filepath.Join(dir, "kubelet-client-current.pem")) },
		"with an empty newest file": func(dir string) error {
			newest := filepath.Join(dir, "kubelet-client-2999-01-01-00-00-00.pem")
			current := filepath.Join(dir, "kubelet-client-current.pem")
			if err := os.WriteFile(newest, nil, 0o600); err != nil {
				return err
			}
			if err := os.Remove(current); err != nil {
				return err
			}
			return os.Symlink(newest, current)
		},
	} {
		t.Run(how, func(t *testing.T) {
			dir := layout.DataDir(t.TempDir())
			key := newKey(t)
			text, err := keyutil.MarshalPrivateKeyToPEM(key)
			if err != nil {
				t.Fatal(err)
			}
			store, err := clientcertificate.NewFileStore("kubelet-client", dir.NodePKI(), dir.NodePKI(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			der := certified(t, certs, "system:node:worker", key, now)
			if _, err := store.Update(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), text); err != nil {
				t.Fatal(err)
			}
			ca, err := os.ReadFile(certs.Cert("server-ca"))
			if err != nil {
				t.Fatal(err)
			}
			f := files(dir)
			if err := os.WriteFile(f.ServerCA, ca, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := crash(dir.NodePKI()); err != nil {
				t.Fatal(err)
			}
			got, err := Machine{DataDir: dir, NodeName: "worker"}.membership(f, now)
			if err != nil || !got.valid || got.key == nil || !got.key.Equal(key) {
				t.Errorf("the node has its certificate: %t (%v)", got.valid, err)
			}
		})
	}
}
