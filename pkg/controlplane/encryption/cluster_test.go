//go:build integration

package encryption_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/layout"
)

// A running server's Secrets are encrypted, re-encrypted with another key, and decrypted again, as the datastore's files prove. The
// server also has the other settings of the hardening page.
func TestOnAServer(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	kubeconfig := controlplanetest.Start(t, log, "--audit-log", "--pod-security", "restricted",
		"--kube-apiserver-arg=enable-admission-plugins=NodeRestriction,EventRateLimit,DenyServiceExternalIPs")
	cred := filepath.Dir(kubeconfig)
	server := filepath.Dir(cred)
	dir := layout.DataDir(filepath.Dir(server))
	endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	cluster := encryption.Cluster{
		Place:      encryption.Place{File: dir.EncryptionFile(), Datastore: endpoint, Reload: controlplanetest.KeyReload},
		Kubeconfig: kubeconfig,
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 500, 500
	client := kubernetes.NewForConfigOrDie(config)
	ctx := t.Context()

	create := func(name, text string) {
		t.Helper()
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"password": text}}
		if _, err := client.CoreV1().Secrets(metav1.NamespaceDefault).Create(ctx, s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	wantSecrets := func(texts map[string]string) {
		t.Helper()
		for name, text := range texts {
			s, err := client.CoreV1().Secrets(metav1.NamespaceDefault).Get(ctx, name, metav1.GetOptions{})
			if err != nil || string(s.Data["password"]) != text {
				t.Errorf("Secret %s: %v %v, want %s", name, s.Data, err, text)
			}
		}
	}
	// inDatastore searches for a text in every file of the datastore.
	inDatastore := func(text string) bool {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(server, "db", "*"))
		if err != nil || len(files) == 0 {
			t.Fatal("no datastore: ", err)
		}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(content, []byte(text)) {
				return true
			}
		}
		return false
	}
	status := func() *encryption.Status {
		t.Helper()
		s, err := cluster.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}

	create("plain", "plaintext-before")
	if !inDatastore("plaintext-before") {
		t.Fatal("the test does not find an unencrypted Secret")
	}
	if s := status(); s.Enabled || len(s.Keys) != 0 || s.Plain == 0 || s.Unfinished {
		t.Errorf("at first: %+v", s)
	}
	if err := cluster.Rotate(ctx, ""); err == nil || !strings.Contains(err.Error(), "enable") {
		t.Errorf("rotation without a key: %v", err)
	}

	// What comes before a change prevents it.
	prevented := cluster
	prevented.Before = func(context.Context) error { return errors.New("no room for a snapshot") }
	if err := prevented.Enable(ctx, encryption.Secretbox); err == nil || !strings.Contains(err.Error(), "no room for a snapshot") {
		t.Errorf("a change that is prevented: %v", err)
	}
	if s := status(); s.Enabled || len(s.Keys) != 0 || s.Unfinished {
		t.Errorf("a change that was prevented: %+v", s)
	}

	if err := cluster.Enable(ctx, encryption.Secretbox); err != nil {
		t.Fatal(err)
	}
	create("sealed", "plaintext-after")
	if inDatastore("plaintext-after") {
		t.Error("a Secret is not encrypted")
	}
	first := status()
	if !first.Enabled || len(first.Keys) != 1 || first.Keys[0].Secrets < 2 || first.Plain != 0 || first.Unfinished {
		t.Errorf("encrypted: %+v", first)
	}
	wantSecrets(map[string]string{"plain": "plaintext-before", "sealed": "plaintext-after"})

	// Many Secrets, with concurrent writes and deletions.
	for i := range 230 {
		create(fmt.Sprintf("many-%d", i), "many")
	}
	busy, end := context.WithCancel(ctx)
	ended := inBackground(func() error {
		for i := 0; busy.Err() == nil; i++ {
			name := fmt.Sprintf("many-%d", i%230)
			if err := client.CoreV1().Secrets(metav1.NamespaceDefault).Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return err
			}
			s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"password": "many"}}
			if _, err := client.CoreV1().Secrets(metav1.NamespaceDefault).Create(ctx, s, metav1.CreateOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
	if err := cluster.Rotate(ctx, encryption.AESCBC); err != nil {
		t.Fatal(err)
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	second := status()
	if len(second.Keys) != 1 || second.Keys[0].Name == first.Keys[0].Name || second.Keys[0].Provider != encryption.AESCBC || second.Keys[0].Secrets < 230 || second.Plain != 0 || second.Unfinished {
		t.Errorf("with a new key: %+v", second)
	}
	wantSecrets(map[string]string{"plain": "plaintext-before", "sealed": "plaintext-after", "many-7": "many", "many-229": "many"})

	// An interrupted rotation is detected, and completed by the component.
	breaking, cut := context.WithCancel(ctx)
	broken := cluster
	broken.Progress = func(int, int) { cut() }
	if err := broken.Rotate(breaking, encryption.Secretbox); err == nil {
		t.Fatal("the rotation was not interrupted")
	}
	third := status()
	if !third.Unfinished || len(third.Keys) != 2 || third.Keys[0].Provider != encryption.Secretbox || !third.Keys[0].Active || third.Keys[1].Secrets == 0 {
		t.Errorf("an interrupted rotation: %+v", third)
	}
	// However often the component tries, it saves one snapshot.
	saved := 0
	finishing := cluster
	finishing.Before = func(context.Context) error {
		if saved++; saved == 1 {
			return errors.New("not yet")
		}
		return nil
	}
	c := encryption.New(finishing, encryption.Self{}, "", log)
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); c.Ready(ctx) != nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("after a minute: ", c.Ready(ctx))
		}
	}
	if err := c.Stop(ctx); err != nil {
		t.Error(err)
	}
	if saved != 2 {
		t.Errorf("%d snapshots were tried, want one that failed and one that did not", saved)
	}
	if s := status(); s.Unfinished || len(s.Keys) != 1 || s.Keys[0].Name != third.Keys[0].Name || s.Keys[0].Secrets < 230 {
		t.Errorf("after the component: %+v", s)
	}

	if err := cluster.Disable(ctx); err != nil {
		t.Fatal(err)
	}
	if s := status(); s.Enabled || len(s.Keys) != 0 || s.Plain < 230 || s.Unfinished {
		t.Errorf("decrypted: %+v", s)
	}
	wantSecrets(map[string]string{"plain": "plaintext-before", "sealed": "plaintext-after", "many-229": "many"})

	t.Run("audit log", func(t *testing.T) {
		log := filepath.Join(server, "logs", "audit.log")
		for path, mode := range map[string]os.FileMode{log: 0o600, filepath.Dir(log): 0o700} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
				t.Errorf("%s: %v %v, want mode %o", path, info, err, mode)
			}
		}
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(text, []byte("plaintext-")) {
			t.Error("the audit log contains a Secret")
		}
		made := false
		for line := range strings.Lines(string(text)) {
			var event struct {
				Level, Verb string
				User        struct{ Username string }
				ObjectRef   struct{ Resource, Name string }
			}
			if err := json.Unmarshal([]byte(line), &event); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			made = made || event.Verb == "create" && event.ObjectRef.Resource == "secrets" && event.Level == "Metadata" && event.User.Username != ""
		}
		if !made {
			t.Error("no line records the creator of a Secret")
		}
	})
	t.Run("pod security", func(t *testing.T) {
		privileged := true
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "root"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "c", Image: "none", SecurityContext: &corev1.SecurityContext{Privileged: &privileged}}}}}
		dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
		if _, err := client.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, pod, dry); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "PodSecurity") {
			t.Errorf("a privileged pod in a namespace without a label: %v", err)
		}
		if _, err := client.CoreV1().Pods(metav1.NamespaceSystem).Create(ctx, pod, dry); err != nil {
			t.Errorf("a privileged pod in kube-system: %v", err)
		}
	})
	t.Run("external IPs", func(t *testing.T) {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "thief"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}, ExternalIPs: []string{"192.0.2.7"}}}
		if _, err := client.CoreV1().Services(metav1.NamespaceDefault).Create(ctx, s, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a Service with an external address: %v", err)
		}
	})
}

// inBackground runs f in the background and yields its error.
func inBackground(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}
