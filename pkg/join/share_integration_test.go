//go:build integration

package join_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// further returns what another server of the cluster shares, with a data dir of its own.
func further(t *testing.T, dir layout.DataDir) (*join.Shared, layout.DataDir) {
	t.Helper()
	own := layout.DataDir(t.TempDir())
	for _, folder := range []string{"tls", "cred"} {
		if err := os.CopyFS(own.Server(folder), os.DirFS(dir.Server(folder))); err != nil {
			t.Fatal(err)
		}
	}
	endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	flags := config.ServerFlags()
	if err := flags.Parse([]string{"--data-dir", string(own), "--cluster-init"}); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Server(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &join.Shared{Config: cfg, Datastore: bootstrap.External, Endpoint: endpoint}, own
}

// Servers whose files were removed at the same time have made one token each. They end with the same one.
func serverTokens(t *testing.T, admin kubernetes.Interface, kubeconfig string, dir layout.DataDir) {
	text, err := os.ReadFile(dir.ServerToken())
	if err != nil {
		t.Fatal(err)
	}
	want, err := token.Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	files := []string{dir.ServerToken()}
	key, err := bootstrap.ReadKey(dir.BootstrapKey())
	if err != nil {
		t.Fatal(err)
	}
	endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	var store bootstrap.Store
	if store.Client, err = endpoint.Client(); err != nil {
		t.Fatal(err)
	}
	defer store.Client.Close()
	// Another test's server may have made one, too.
	before, err := store.Read(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if shared, err := token.Parse(before.Token); err != nil {
		t.Fatal(err)
	} else if shared.ID < want.ID {
		want = shared
	}
	for i := range 3 {
		made, err := join.CreateToken(t.Context(), admin, want.CAHash, join.TokenOptions{Role: token.Server}, join.ShareToken(dir.BootstrapKey(), dir.DatastoreEndpoint()))
		if err != nil {
			t.Fatal(err)
		}
		label := []byte(`{"metadata": {"labels": {"join.polymesh.dev/server-token": "true"}}}`)
		if _, err := admin.CoreV1().Secrets(metav1.NamespaceSystem).Patch(t.Context(), "bootstrap-token-"+made.ID, types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		shared, own := further(t, dir)
		if err := os.WriteFile(own.ServerToken(), []byte(made.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if made.ID < want.ID {
			want = made
		}
		files = append(files, own.ServerToken())
		startServer(t, kubeconfig, dir, fmt.Sprint("makes-a-token-", i), shared)
	}
	controlplanetest.Eventually(t, "all servers have one token", func() error {
		for _, file := range files {
			if text, err := os.ReadFile(file); err != nil || string(text) != want.String()+"\n" {
				return fmt.Errorf("%s has another: %w", file, err)
			}
		}
		b, err := store.Read(t.Context(), key)
		if err == nil && b.Token != want.String() {
			err = errors.New("they share another")
		}
		return err
	})
}

// A server ends when another data dir has taken its node's name, and its own runs on.
func takenName(t *testing.T, kubeconfig string, dir layout.DataDir) {
	shared, _ := further(t, dir)
	client, err := shared.Endpoint.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	shared.ID = "FIRST"
	if err := (bootstrap.Store{Client: client}).Take(t.Context(), "cloned", shared.ID, false); err != nil {
		t.Fatal(err)
	}
	first := startServer(t, kubeconfig, dir, "cloned", shared)
	controlplanetest.Eventually(t, "the server that has the name is ready", func() error { return first.Ready(t.Context()) })
	if err := first.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	// Nothing renews the Lease.
	if err := (bootstrap.Store{Client: client, LeaseLife: time.Second}).Take(t.Context(), "cloned", "SECOND", false); err != nil {
		t.Fatal(err)
	}
	former := startServer(t, kubeconfig, dir, "cloned", shared)
	select {
	case err := <-former.Failed():
		if taken := new(bootstrap.TakenError); !errors.As(err, &taken) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Errorf("a server without its name runs: %v", former.Ready(t.Context()))
	}
}
