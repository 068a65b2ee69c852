//go:build integration

package join_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	serverconfig "polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// Machines join a real API server. What a token and a node's certificate can do, and what they cannot, is decided by it.
func TestJoin(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.DiscardHandler))
	dir := layout.DataDir(filepath.Dir(filepath.Dir(filepath.Dir(kubeconfig))))
	admin := controlplanetest.Client(t, kubeconfig)
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	var nodeToken token.Token
	controlplanetest.Eventually(t, "the node token", func() error {
		text, err := os.ReadFile(dir.NodeToken())
		if err == nil {
			nodeToken, err = token.Parse(string(text))
		}
		return err
	})
	if info, err := os.Stat(dir.NodeToken()); err != nil || info.Mode() != 0o600 {
		t.Errorf("the node token's file is %v, %v", info, err)
	}
	next := byte(10)
	machine := func(name string, tok token.Token) join.Machine {
		next++
		return join.Machine{
			DataDir: layout.DataDir(t.TempDir()), Server: config.Host, Token: tok, NodeName: name, NodeIP: netip.AddrFrom4([4]byte{192, 0, 2, next}), Version: controlplanetest.KubernetesVersion,
			Waiting: func(why string) { t.Log(name, "waits:", why) }, Log: slog.New(slog.DiscardHandler),
		}
	}
	// settled is for machines whose refusal is certain: the server has started, and knows what it refuses.
	settled := func(m join.Machine) join.Machine {
		m.Settling = time.Nanosecond
		return m
	}
	wantRefused := func(t *testing.T, what string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), nodeToken.Secret) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	// clients of a node, by its files.
	client := func(t *testing.T, m *join.Membership) *kubernetes.Clientset {
		t.Helper()
		c := &rest.Config{Host: config.Host, TLSClientConfig: rest.TLSClientConfig{CAFile: m.Files.ServerCA, CertFile: m.Files.Client, KeyFile: m.Files.Client}}
		return kubernetes.NewForConfigOrDie(c)
	}
	register := func(t *testing.T, name string, m *join.Membership) error {
		t.Helper()
		_, err := client(t, m).CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	}

	one := machine("worker-1", nodeToken)
	member, err := join.Join(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if member.Cluster.ClusterDomain != "cluster.local" || member.Cluster.APIServiceIP.String() != "10.43.0.1" {
		t.Errorf("the cluster's settings are %+v", member.Cluster)
	}
	if _, err := certificate.ParseAuthority([]byte(member.Cluster.KubeletCA)); err != nil {
		t.Errorf("the authority by which nodes know each other: %v", err)
	}
	// The server's folder of volumes, next to its folder of credentials.
	if want := filepath.Join(filepath.Dir(kubeconfig), "..", "..", "storage"); member.Cluster.StorageDir != want {
		t.Errorf("the folder of volumes is %q, want %q", member.Cluster.StorageDir, want)
	}
	if err := register(t, "worker-1", member); err != nil {
		t.Fatal(err)
	}

	t.Run("files", func(t *testing.T) {
		for _, path := range []string{member.Files.Client, member.Files.Serving, one.DataDir.Membership()} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", path, info, err)
			}
		}
		if left, _ := filepath.Glob(one.DataDir.NodePKI() + "/join-*"); len(left) > 0 {
			t.Errorf("%q is left", left)
		}
		pair, err := tls.LoadX509KeyPair(member.Files.Serving, member.Files.Serving)
		if err != nil {
			t.Fatal(err)
		}
		for ca, want := range map[string]bool{certificate.KubeletCA: true, certificate.ServerCA: false, certificate.ClientCA: false} {
			text, err := os.ReadFile(certificate.Store(dir.TLS()).Cert(ca))
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(text)
			authority, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if got := pair.Leaf.CheckSignatureFrom(authority) == nil; got != want {
				t.Errorf("signed by %s: %t, want %t", ca, got, want)
			}
		}
		if err := pair.Leaf.VerifyHostname(one.NodeIP.String()); err != nil {
			t.Error(err)
		}
	})

	t.Run("again", func(t *testing.T) {
		before, err := os.ReadFile(member.Files.Client)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := join.Join(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		if after, err := os.ReadFile(member.Files.Client); err != nil || string(after) != string(before) {
			t.Errorf("a member has got another certificate: %v", err)
		}
		// Without the authority there is no membership.
		if err := os.Remove(member.Files.ServerCA); err != nil {
			t.Fatal(err)
		}
		_, err = join.Join(t.Context(), one)
		wantRefused(t, "a machine that has lost its certificate", err, "the cluster has a node worker-1 already")
		if err := os.RemoveAll(string(one.DataDir)); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("names", func(t *testing.T) {
		_, err := join.Join(t.Context(), machine("worker-1", nodeToken))
		wantRefused(t, "the name of a node", err, "the cluster has a node worker-1 already")
		// Nodes that have not registered yet.
		two := machine("worker-2", nodeToken)
		if _, err := join.Join(t.Context(), two); err != nil {
			t.Fatal(err)
		}
		_, err = join.Join(t.Context(), machine("worker-2", nodeToken))
		wantRefused(t, "a name that has been certified", err, "joined under the name worker-2 on")
		// The record goes with the node, and the name is free again. A node's own certificate cannot remove it.
		m, err := join.Join(t.Context(), two)
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "worker-2", m); err != nil {
			t.Fatal(err)
		}
		if err := client(t, m).CoreV1().Secrets("kube-system").Delete(t.Context(), "joined.worker-2", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a node removes the record of its name: %v", err)
		}
		controlplanetest.Eventually(t, "the record has its node", func() error {
			record, err := admin.CoreV1().Secrets("kube-system").Get(t.Context(), "joined.worker-2", metav1.GetOptions{})
			if err == nil && len(record.Data["node"]) == 0 {
				err = errors.New("it has no node")
			}
			return err
		})
		if err := admin.CoreV1().Nodes().Delete(t.Context(), "worker-2", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := join.Join(t.Context(), machine("worker-2", nodeToken)); err != nil {
			t.Errorf("the name of a node that was removed: %v", err)
		}
	})

	t.Run("a node that was removed", func(t *testing.T) {
		old := machine("worker-6", nodeToken)
		former, err := join.Join(t.Context(), old)
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "worker-6", former); err != nil {
			t.Fatal(err)
		}
		api := client(t, former)
		if _, err := api.CoreV1().Nodes().Get(t.Context(), "worker-6", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		// Once the cluster knows that the machine's node is this one.
		controlplanetest.Eventually(t, "the record has its node", func() error {
			record, err := admin.CoreV1().Secrets("kube-system").Get(t.Context(), "joined.worker-6", metav1.GetOptions{})
			if err == nil && len(record.Data["node"]) == 0 {
				err = errors.New("it has no node")
			}
			return err
		})
		// Of a node that exists: Kubernetes deletes pods of nodes that do not, after a while.
		if _, err := admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "another"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		for name, node := range map[string]string{"on-worker-6": "worker-6", "on-another": "another"} {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "app", Image: "app:1"}}}}
			controlplanetest.Eventually(t, "a pod on "+node, func() error {
				_, err := admin.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{})
				return err
			})
		}
		// What it has requested, and has not been signed yet: this one waits until its node has an address.
		pending := requestServing(t, api, "worker-6", old.NodeIP)
		if err := admin.CoreV1().Nodes().Delete(t.Context(), "worker-6", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "the record says that it was removed", func() error {
			record, err := admin.CoreV1().Secrets("kube-system").Get(t.Context(), "joined.worker-6", metav1.GetOptions{})
			if err == nil && len(record.Data["removed"]) == 0 {
				err = errors.New("it does not")
			}
			return err
		})
		// Before its name is free: a machine that has it does not get the former's pods.
		if _, err := admin.CoreV1().Pods("default").Get(t.Context(), "on-worker-6", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("a pod of the removed node is there: %v", err)
		}
		if _, err := admin.CoreV1().Pods("default").Get(t.Context(), "on-another", metav1.GetOptions{}); err != nil {
			t.Errorf("a pod of another node is gone: %v", err)
		}
		// Its certificate is good for nothing: it neither registers, nor renews, nor reads.
		wantNone := func() error {
			if _, err := api.CoreV1().Services("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
				return fmt.Errorf("its certificate is accepted: %w", err)
			}
			return nil
		}
		controlplanetest.Eventually(t, "the certificate is void", wantNone)
		controlplanetest.Eventually(t, "what it has requested is gone", func() error {
			_, err := admin.CertificatesV1().CertificateSigningRequests().Get(t.Context(), pending, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there: %w", err)
		})
		// The controller manager may have been about to sign. That certificate is later than the removal.
		late := client(t, signedNow(t, dir, former, "worker-6"))
		wantLateNone := func() error {
			if _, err := late.CoreV1().Services("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
				return fmt.Errorf("a certificate that was made after the removal is accepted: %w", err)
			}
			return nil
		}
		if err := wantLateNone(); err != nil {
			t.Error(err)
		}
		if err := register(t, "worker-6", former); !apierrors.IsUnauthorized(err) {
			t.Errorf("it registers again: %v", err)
		}
		if _, err := api.CertificatesV1().CertificateSigningRequests().Create(t.Context(), &certificatesv1.CertificateSigningRequest{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "csr-"},
			Spec:       certificatesv1.CertificateSigningRequestSpec{SignerName: certificatesv1.KubeAPIServerClientKubeletSignerName, Request: []byte("x"), Usages: []certificatesv1.KeyUsage{"client auth"}},
		}, metav1.CreateOptions{}); !apierrors.IsUnauthorized(err) {
			t.Errorf("it renews its certificate: %v", err)
		}
		// Without a token it stays out, and says why.
		stays := settled(old)
		stays.Token = token.Token{}
		_, err = join.Join(t.Context(), stays)
		wantRefused(t, "a removed node without a token", err, "because its node was removed: give a token")
		// What it has of the cluster can be removed: it has nothing to leave.
		wantGone := func(what string, dir layout.DataDir, want string) {
			t.Helper()
			var gone *join.GoneError
			if err := join.Leave(t.Context(), dir, config.Host); !errors.As(err, &gone) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s leaves: %v", what, err)
			}
		}
		wantGone("a removed node", old.DataDir, "its node was removed before")
		// Another machine gets the name; the former's certificate is not one for it, and does not prove that it is the node.
		heir := machine("worker-6", nodeToken)
		member, err := join.Join(t.Context(), heir)
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "worker-6", member); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(wantNone(), wantLateNone()); err != nil {
			t.Error(err)
		}
		_, err = join.Join(t.Context(), settled(old))
		wantRefused(t, "a removed node, with a token, under the name of another", err, "the cluster has a node worker-6 already")
		// A machine that leaves cannot come back either. Under its name it is a new one.
		if err := join.Leave(t.Context(), heir.DataDir, config.Host); err != nil {
			t.Fatal(err)
		}
		api = client(t, member)
		controlplanetest.Eventually(t, "the certificate is void", wantNone)
		wantGone("a machine that has left", heir.DataDir, "its node was removed before")
		if _, err := join.Join(t.Context(), settled(heir)); err != nil {
			t.Fatalf("it joins again with a token: %v", err)
		}
		// A machine that was replaced, with a copy of its files, under its name.
		if _, err := admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker-6"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		id := []byte(`{"status": {"nodeInfo": {"machineID": "another"}}}`)
		if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "worker-6", "application/merge-patch+json", id, metav1.PatchOptions{}, "status"); err != nil {
			t.Fatal(err)
		}
		if id, err := os.ReadFile("/etc/machine-id"); err == nil && len(strings.TrimSpace(string(id))) > 0 {
			wantGone("a machine that was replaced", heir.DataDir, "another machine is node worker-6 now")
			if _, err := admin.CoreV1().Nodes().Get(t.Context(), "worker-6", metav1.GetOptions{}); err != nil {
				t.Errorf("the other machine's node: %v", err)
			}
		}
	})

	t.Run("a node's rights", func(t *testing.T) {
		m, err := join.Join(t.Context(), machine("worker-3", nodeToken))
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "other", m); !apierrors.IsForbidden(err) {
			t.Errorf("a node registers another: %v", err)
		}
		if err := register(t, "worker-3", m); err != nil {
			t.Error(err)
		}
		api := client(t, m).CoreV1()
		if _, err := api.Secrets("kube-system").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a node lists Secrets: %v", err)
		}
		if _, err := api.Secrets("kube-system").Get(t.Context(), "bootstrap-token-"+nodeToken.ID, metav1.GetOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a node reads a token: %v", err)
		}
		patch := []byte(`{"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}`)
		if _, err := api.Nodes().Patch(t.Context(), "worker-3", "application/merge-patch+json", patch, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a node makes itself a server: %v", err)
		}
		if _, err := api.Services("").List(t.Context(), metav1.ListOptions{}); err != nil {
			t.Errorf("kube-proxy cannot list services: %v", err)
		}
		if err := api.RESTClient().Post().AbsPath(join.AgentPath).Do(t.Context()).Error(); !apierrors.IsForbidden(err) {
			t.Errorf("a node joins another machine: %v", err)
		}
	})

	t.Run("a token's rights", func(t *testing.T) {
		c := &rest.Config{Host: config.Host, BearerToken: nodeToken.Bearer(), TLSClientConfig: rest.TLSClientConfig{CAFile: certificate.Store(dir.TLS()).Cert(certificate.ServerCA)}}
		api := kubernetes.NewForConfigOrDie(c)
		_, nodes := api.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
		_, secrets := api.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
		_, requests := api.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
		for what, err := range map[string]error{
			"nodes": nodes, "Secrets": secrets, "signing requests": requests,
			"the cluster's settings": api.RESTClient().Get().AbsPath(join.ClusterPath).Do(t.Context()).Error(),
			"leaving":                api.RESTClient().Post().AbsPath(join.LeavePath).Do(t.Context()).Error(),
			"the server's metrics":   api.RESTClient().Get().AbsPath("/metrics").Do(t.Context()).Error(),
		} {
			if !apierrors.IsForbidden(err) {
				t.Errorf("a token allows %s: %v", what, err)
			}
		}
	})

	t.Run("tokens", func(t *testing.T) {
		made, err := join.CreateToken(t.Context(), admin, nodeToken.CAHash, join.TokenOptions{TTL: time.Hour, Description: "of the test"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := join.Join(t.Context(), machine("worker-4", made)); err != nil {
			t.Error(err)
		}
		forAgents := func() ([]join.TokenInfo, error) {
			list, err := join.ListTokens(t.Context(), admin)
			return slices.DeleteFunc(list, func(i join.TokenInfo) bool { return i.Role == token.Server }), err
		}
		list, err := forAgents()
		if err != nil || len(list) != 2 || list[1].ID != made.ID || list[1].Description != "of the test" || list[1].Expires == nil || list[0].ID != nodeToken.ID || list[0].Expires != nil {
			t.Errorf("%+v, %v", list, err)
		}
		if text := fmt.Sprintf("%+v", list); strings.Contains(text, made.Secret) || strings.Contains(text, nodeToken.Secret) {
			t.Error("the list has secrets")
		}
		revoked, err := join.RevokeTokens(t.Context(), admin, "aaaaaa", made.String())
		if len(revoked) != 1 || revoked[0].ID != made.ID || !errors.Is(err, join.ErrUnknownToken) {
			t.Fatalf("next to an unknown one: %+v, %v", revoked, err)
		}
		if _, err := join.RevokeTokens(t.Context(), admin, made.ID); !errors.Is(err, join.ErrUnknownToken) {
			t.Errorf("revoked twice: %v", err)
		}
		controlplanetest.Eventually(t, "a revoked token", func() error {
			_, err := join.Join(t.Context(), settled(machine(fmt.Sprintf("late-%d", time.Now().UnixNano()), made)))
			if err == nil {
				return errors.New("a machine has joined with it")
			}
			wantRefused(t, "a revoked token", err, "the cluster does not accept token "+made.ID)
			return nil
		})
		short, err := join.CreateToken(t.Context(), admin, nodeToken.CAHash, join.TokenOptions{TTL: time.Second}, nil)
		if err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "an expired token is removed", func() error {
			list, err := forAgents()
			if err == nil && len(list) != 1 {
				err = fmt.Errorf("%+v", list)
			}
			return err
		})
		_, err = join.Join(t.Context(), settled(machine("later", short)))
		wantRefused(t, "an expired token", err, "the cluster does not accept token "+short.ID)
		// Bootstrap tokens of others are not ours to list or revoke.
		if _, err := admin.CoreV1().Secrets("kube-system").Create(t.Context(), &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-aaaaaa"}, Type: "bootstrap.kubernetes.io/token",
			StringData: map[string]string{"token-id": "aaaaaa", "token-secret": "aaaaaaaaaaaaaaaa", "usage-bootstrap-authentication": "true"},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := join.RevokeTokens(t.Context(), admin, "aaaaaa"); !errors.Is(err, join.ErrUnknownToken) {
			t.Errorf("another's token: %v", err)
		}
		foreign := token.Token{CAHash: nodeToken.CAHash, ID: "aaaaaa", Secret: "aaaaaaaaaaaaaaaa"}
		api := kubernetes.NewForConfigOrDie(&rest.Config{Host: config.Host, BearerToken: foreign.Bearer(), TLSClientConfig: rest.TLSClientConfig{CAFile: certificate.Store(dir.TLS()).Cert(certificate.ServerCA)}})
		controlplanetest.Eventually(t, "the API server knows another's bootstrap token", func() error {
			if err := api.RESTClient().Get().AbsPath(join.ClusterPath).Do(t.Context()).Error(); !apierrors.IsForbidden(err) {
				return fmt.Errorf("it responds with %w", err)
			}
			return nil
		})
		if _, err := join.Join(t.Context(), settled(machine("with-anothers", foreign))); err == nil {
			t.Error("a machine has joined with another's bootstrap token")
		}
	})

	t.Run("servers", func(t *testing.T) {
		authorityOf := rest.TLSClientConfig{CAFile: certificate.Store(dir.TLS()).Cert(certificate.ServerCA)}
		var serverToken token.Token
		controlplanetest.Eventually(t, "the server token", func() error {
			text, err := os.ReadFile(dir.ServerToken())
			if err == nil {
				serverToken, err = token.Parse(string(text))
			}
			return err
		})
		if info, err := os.Stat(dir.ServerToken()); err != nil || info.Mode() != 0o600 || serverToken.Role() != token.Server {
			t.Errorf("the server token's file is %v, %v", info, err)
		}
		b, _, err := join.JoinServers(t.Context(), machine("server-2", serverToken))
		if err != nil {
			t.Fatal(err)
		}
		if err := certificate.Import(certificate.Store(t.TempDir()), b.Authorities); err != nil {
			t.Error(err)
		}
		if b.Token != serverToken.String() || !slices.Contains(b.Settings, "cluster-cidr=10.42.0.0/16") || len(b.Encryption) == 0 {
			t.Errorf("the settings are %q", b.Settings)
		}
		agent, err := join.Join(t.Context(), machine("worker-7", serverToken))
		if err != nil {
			t.Fatalf("an agent with a server's token: %v", err)
		}
		// An agent's token, also in the form of a server's, and what the cluster stores of a server's.
		stored := serverToken
		stored.Secret = serverToken.BootstrapSecret()
		for what, tok := range map[string]token.Token{"an agent's token": nodeToken, "what the cluster stores": stored} {
			api := kubernetes.NewForConfigOrDie(&rest.Config{Host: config.Host, BearerToken: tok.Bearer(), TLSClientConfig: authorityOf})
			request := join.Request{NodeName: "server-3", NodeIP: netip.MustParseAddr("192.0.2.99"), Version: controlplanetest.KubernetesVersion, Now: time.Now()}
			body, err := json.Marshal(request)
			if err != nil {
				t.Fatal(err)
			}
			answer, err := api.RESTClient().Post().AbsPath(join.ServerPath).Body(body).DoRaw(t.Context())
			if what == "an agent's token" {
				if !apierrors.IsForbidden(err) {
					t.Errorf("%s is answered %q, %v", what, answer, err)
				}
				continue
			}
			// It authenticates, and opens nothing.
			var g join.ServerGrant
			if err == nil {
				err = json.Unmarshal(answer, &g)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := bootstrap.OpenWith(tok, g.Bundle, g.Key); err == nil {
				t.Errorf("%s opens what the servers share", what)
			}
		}
		// Neither a node nor a token is a server.
		for what, api := range map[string]*kubernetes.Clientset{
			"a node":           client(t, agent),
			"a server's token": kubernetes.NewForConfigOrDie(&rest.Config{Host: config.Host, BearerToken: serverToken.Bearer(), TLSClientConfig: authorityOf}),
		} {
			for path, err := range map[string]error{
				join.SharesPath: api.RESTClient().Get().AbsPath(join.SharesPath).Do(t.Context()).Error(),
				join.MemberPath: api.RESTClient().Post().AbsPath(join.MemberPath).Do(t.Context()).Error(),
			} {
				if !apierrors.IsForbidden(err) {
					t.Errorf("%s may call %s: %v", what, path, err)
				}
			}
		}
		if err := client(t, agent).RESTClient().Post().AbsPath(join.ServerPath).Do(t.Context()).Error(); !apierrors.IsForbidden(err) {
			t.Errorf("a node may become a server: %v", err)
		}
		for what, change := range map[string]func(*join.Machine){
			"the cluster has a node worker-1 already": func(m *join.Machine) { m.NodeName = "worker-1" },
			"must have the same minor version":        func(m *join.Machine) { m.Version = "v1.35.0" },
			"cannot be the address of a node":         func(m *join.Machine) { m.NodeIP = netip.MustParseAddr("10.43.0.7") },
		} {
			m := machine("server-4", serverToken)
			change(&m)
			_, _, err := join.JoinServers(t.Context(), m)
			wantRefused(t, what, err, what)
		}
		// A token that is revoked opens nothing more, and what lets it open is gone.
		endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
		if err != nil {
			t.Fatal(err)
		}
		db, err := endpoint.Client()
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		store := bootstrap.Store{Client: db}
		made, err := join.CreateToken(t.Context(), admin, nodeToken.CAHash, join.TokenOptions{Role: token.Server}, join.ShareToken(dir.BootstrapKey(), dir.DatastoreEndpoint()))
		if err != nil {
			t.Fatal(err)
		}
		if again, _, err := store.Open(t.Context(), made); err != nil || again.Token != b.Token {
			t.Errorf("with the token, the datastore's bundle is opened: %v", err)
		}
		if _, err := join.RevokeTokens(t.Context(), admin, made.ID); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "a revoked token", func() error {
			// A machine that joins makes the server look.
			if _, _, err := join.JoinServers(t.Context(), machine(fmt.Sprintf("later-%d", time.Now().UnixNano()), serverToken)); err != nil {
				return err
			}
			if _, _, err := store.Sealed(t.Context(), made.ID); !errors.Is(err, bootstrap.ErrNone) {
				return fmt.Errorf("it still opens the datastore's bundle: %v", err)
			}
			return nil
		})
		if _, err := store.Read(t.Context(), make(bootstrap.Key, 32)); err == nil {
			t.Error("another key opens the bundle")
		}
		raw, err := db.Get(t.Context(), "/polymesh/bootstrap/bundle")
		if err != nil || len(raw.Kvs) != 1 || bytes.Contains(raw.Kvs[0].Value, []byte("PRIVATE KEY")) {
			t.Errorf("the datastore's text is %q, %v", raw.Kvs, err)
		}
	})

	t.Run("writers", func(t *testing.T) { writers(t, admin, config) })

	t.Run("servers' names", func(t *testing.T) {
		text, err := os.ReadFile(dir.ServerToken())
		if err != nil {
			t.Fatal(err)
		}
		serverToken, err := token.Parse(string(text))
		if err != nil {
			t.Fatal(err)
		}
		// The server has recorded itself before there was a token, and its node has not registered.
		_, err = join.Join(t.Context(), machine("none", nodeToken))
		wantRefused(t, "an agent with the name of the first server", err, "a server at \"192.0.2.1\" joined under the name none")
		_, _, err = join.JoinServers(t.Context(), machine("none", serverToken))
		wantRefused(t, "a server with the name of the first server", err, "a server at \"192.0.2.1\" joined under the name none")
		if _, _, err := join.JoinServers(t.Context(), machine("server-8", serverToken)); err != nil {
			t.Fatal(err)
		}
		_, err = join.Join(t.Context(), machine("server-8", nodeToken))
		wantRefused(t, "an agent with the name of a server that has joined", err, "joined under the name server-8")
		// Interrupted before it ran, it joins again, also with an empty data dir.
		if _, _, err := join.JoinServers(t.Context(), machine("server-8", serverToken)); err != nil {
			t.Error(err)
		}
		running := startServer(t, kubeconfig, dir, "server-8")
		controlplanetest.Eventually(t, "the server runs", func() error { return running.Ready(t.Context()) })
		_, _, err = join.JoinServers(t.Context(), machine("server-8", serverToken))
		wantRefused(t, "a server with the name of another", err, "a server at \"192.0.2.200\" joined under the name server-8")
		// Another way round.
		if _, err := join.Join(t.Context(), machine("worker-8", nodeToken)); err != nil {
			t.Fatal(err)
		}
		_, _, err = join.JoinServers(t.Context(), machine("worker-8", serverToken))
		wantRefused(t, "a server with the name of an agent", err, "a machine at \"192.0.2.")
		late := startServer(t, kubeconfig, dir, "worker-8")
		select {
		case err := <-late.Failed():
			var taken *join.NameTakenError
			if !errors.As(err, &taken) || !strings.Contains(err.Error(), "give this server another name with --node-name") {
				t.Errorf("a server that found the others in the datastore: %v", err)
			}
		case <-time.After(time.Minute):
			t.Errorf("a server with the name of an agent runs: %v", late.Ready(t.Context()))
		}
	})

	t.Run("a secret that the user has chosen", func(t *testing.T) {
		const chosen = "chosen-by-the-user-0123456789"
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
		flags := serverconfig.ServerFlags()
		if err := flags.Parse([]string{"--data-dir", string(own), "--cluster-init", "--token", chosen}); err != nil {
			t.Fatal(err)
		}
		cfg, err := flags.Server(nil)
		if err != nil {
			t.Fatal(err)
		}
		s := startServer(t, kubeconfig, dir, "chooses", &join.Shared{Config: cfg, Datastore: bootstrap.External, Endpoint: endpoint, Settles: true})
		controlplanetest.Eventually(t, "the server is ready", func() error { return s.Ready(t.Context()) })
		want, err := token.OfSecret(nodeToken.CAHash, chosen)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := os.ReadFile(own.ServerToken()); err != nil || string(text) != want.String()+"\n" {
			t.Errorf("the server's token is %q, %v", text, err)
		}
		if _, _, err := join.JoinServers(t.Context(), machine("server-9", want)); err != nil {
			t.Error(err)
		}
		// By the datastore the secret alone is enough.
		db, err := endpoint.Client()
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		alone, err := token.OfSecret("", chosen)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := (bootstrap.Store{Client: db}).Open(t.Context(), alone); err != nil {
			t.Error(err)
		}
		// Another secret later has no effect by itself, and that is said.
		changed := *cfg
		changed.Secret = "another-of-the-user-0123456789"
		later := startServer(t, kubeconfig, dir, "chooses-again", &join.Shared{Config: &changed, Datastore: bootstrap.External, Endpoint: endpoint, Settles: true})
		controlplanetest.Eventually(t, "the other secret is noted", func() error {
			if note := strings.Join(later.Notes(t.Context()), "\n"); !strings.Contains(note, "the servers' secret in the settings is not that of this cluster") {
				return fmt.Errorf("the note is %q: %w", note, later.Ready(t.Context()))
			}
			return nil
		})
	})

	t.Run("addresses", func(t *testing.T) {
		m := machine("worker-9", nodeToken)
		member, err := join.Join(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "worker-9", member); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "the address of a node is known", func() error {
			addresses, err := join.Addresses(t.Context(), admin)
			if err == nil && addresses["worker-9"] != m.NodeIP {
				err = fmt.Errorf("it is not: %v", addresses)
			}
			return err
		})
		if err := join.Leave(t.Context(), m.DataDir, config.Host); err != nil {
			t.Fatal(err)
		}
		if addresses, err := join.Addresses(t.Context(), admin); err != nil || addresses["worker-9"].IsValid() {
			t.Errorf("the address of a removed node: %v, %v", addresses, err)
		}
	})

	t.Run("tokens that several servers have made", func(t *testing.T) { serverTokens(t, admin, kubeconfig, dir) })

	t.Run("a server whose name another data dir has taken", func(t *testing.T) { takenName(t, kubeconfig, dir) })

	t.Run("records of the version before", func(t *testing.T) { formerRecords(t, admin, kubeconfig, dir) })

	t.Run("clocks and versions", func(t *testing.T) {
		for what, c := range map[string]struct {
			change func(*join.Machine)
			want   string
		}{
			"five minutes ahead":      {func(m *join.Machine) { m.Now = func() time.Time { return time.Now().Add(5 * time.Minute) } }, "this machine's clock shows"},
			"two years behind":        {func(m *join.Machine) { m.Now = func() time.Time { return time.Now().AddDate(-2, 0, 0) } }, "this machine's clock shows"},
			"a minor version too new": {func(m *join.Machine) { m.Version = "v1.37.0+polymesh1" }, "a node must not be newer than the servers: upgrade the servers first"},
			"far too old":             {func(m *join.Machine) { m.Version = "v1.30.2" }, "3 minor versions older at most"},
		} {
			m := machine("refused", nodeToken)
			c.change(&m)
			_, err := join.Join(t.Context(), m)
			wantRefused(t, what, err, c.want)
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: the refusal has several lines: %q", what, err)
			}
		}
		// The version before is welcome.
		m := machine("version-before", nodeToken)
		m.Version = "v1.35.4+polymesh1"
		if _, err := join.Join(t.Context(), m); err != nil {
			t.Error(err)
		}
	})

	t.Run("reach", func(t *testing.T) {
		member, err := join.Join(t.Context(), machine("behind-a-firewall", nodeToken))
		if err != nil {
			t.Fatal(err)
		}
		api := client(t, member)
		if err := register(t, "behind-a-firewall", member); err != nil {
			t.Fatal(err)
		}
		ask := func() (r join.Reach, err error) {
			text, err := api.CoreV1().RESTClient().Post().AbsPath(join.ReachPath).DoRaw(t.Context())
			if err == nil {
				err = json.Unmarshal(text, &r)
			}
			return r, err
		}
		if _, err := ask(); !apierrors.IsServiceUnavailable(err) {
			t.Errorf("a node without an address: %v", err)
		}
		// Nothing listens there.
		patch := []byte(`{"status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.9"}]}}`)
		if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "behind-a-firewall", "application/strategic-merge-patch+json", patch, metav1.PatchOptions{}, "status"); err != nil {
			t.Fatal(err)
		}
		if r, err := ask(); err != nil || !strings.Contains(r.Problem, "127.0.0.9:10250") {
			t.Errorf("%+v, %v", r, err)
		}
		if err := admin.CoreV1().RESTClient().Post().AbsPath(join.ReachPath).Do(t.Context()).Error(); !apierrors.IsForbidden(err) {
			t.Errorf("an administrator asks as a node: %v", err)
		}
	})

	t.Run("another cluster", func(t *testing.T) {
		other := nodeToken
		other.CAHash = strings.Repeat("00", 32)
		_, err := join.Join(t.Context(), machine("stray", other))
		wantRefused(t, "another cluster's token", err, "is not a server of the token's cluster")
	})

	t.Run("leave", func(t *testing.T) {
		m := machine("worker-5", nodeToken)
		member, err := join.Join(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		if err := register(t, "worker-5", member); err != nil {
			t.Fatal(err)
		}
		if name, server, ok := join.Member(m.DataDir); !ok || name != "worker-5" || server != config.Host {
			t.Errorf("the machine is %s of %s, %t", name, server, ok)
		}
		// Another machine has joined under the name since.
		status := func(id string) {
			t.Helper()
			patch := fmt.Appendf(nil, `{"status": {"nodeInfo": {"machineID": %q}}}`, id)
			if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "worker-5", "application/strategic-merge-patch+json", patch, metav1.PatchOptions{}, "status"); err != nil {
				t.Fatal(err)
			}
		}
		if id, err := os.ReadFile("/etc/machine-id"); err == nil && len(id) > 1 {
			status("another")
			wantRefused(t, "a machine that was replaced", join.Leave(t.Context(), m.DataDir, config.Host), "another machine is node worker-5 now")
			status(strings.TrimSpace(string(id)))
		}
		if err := join.Leave(t.Context(), m.DataDir, config.Host); err != nil {
			t.Fatal(err)
		}
		if _, err := admin.CoreV1().Nodes().Get(t.Context(), "worker-5", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("the node is still there: %v", err)
		}
		if _, err := admin.CoreV1().Nodes().Get(t.Context(), "worker-1", metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	})

	t.Run("hostile requests", func(t *testing.T) {
		post := func(body string) (int, string) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, config.Host+join.AgentPath, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+nodeToken.Bearer())
			hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
			resp, err := hc.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var text strings.Builder
			if _, err := fmt.Fprint(&text, resp.Status); err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, text.String()
		}
		for _, body := range []string{"", "x", "[]", `{"nodeName": 1}`, `{"nodeName": "` + strings.Repeat("a", 100<<10) + `"}`, `{"nodeIP": "999.1.1.1"}`} {
			if code, status := post(body); code < 400 || code >= 500 {
				t.Errorf("%.40q is answered with %s", body, status)
			}
		}
	})
}

// requestServing requests a serving certificate as a node, and returns the request's name.
func requestServing(t *testing.T, api *kubernetes.Clientset, name string, address netip.Addr) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: join.User(name), Organization: []string{"system:nodes"}}, DNSNames: []string{name}, IPAddresses: []net.IP{address.AsSlice()},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := api.CertificatesV1().CertificateSigningRequests().Create(t.Context(), &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "csr-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: certificatesv1.KubeletServingSignerName, Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Name
}

// signedNow returns a membership with a certificate of now for a node's name, as the controller manager makes them.
func signedNow(t *testing.T, dir layout.DataDir, m *join.Membership, name string) *join.Membership {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := certificate.Store(dir.TLS()).Sign(certificate.ClientCA, certificate.Request{
		Public: key.Public(), Subject: pkix.Name{CommonName: join.User(name), Organization: []string{"system:nodes"}}, Usage: x509.ExtKeyUsageClientAuth,
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	out := *m
	out.Files.Client = filepath.Join(t.TempDir(), "client.pem")
	if err := os.WriteFile(out.Files.Client, append(cert, text...), 0o600); err != nil {
		t.Fatal(err)
	}
	return &out
}
