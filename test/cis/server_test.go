//go:build e2e

package cis

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/test/e2e/node"
)

// Outcome is the result of a check.
type Outcome string

// The outcomes, as in K3s's self-assessment: Warn is for the administrator to judge.
const (
	Pass          Outcome = "pass"
	Fail          Outcome = "fail"
	NotApplicable Outcome = "not applicable"
	Warn          Outcome = "warn"
)

// Result is an outcome with its evidence.
type Result struct {
	Outcome
	Evidence string
}

func passed(format string, args ...any) Result { return Result{Pass, fmt.Sprintf(format, args...)} }
func failed(format string, args ...any) Result { return Result{Fail, fmt.Sprintf(format, args...)} }

// verdict returns Pass or Fail with the same evidence.
func verdict(ok bool, format string, args ...any) Result {
	if ok {
		return passed(format, args...)
	}
	return failed(format, args...)
}

// server is a running server, inspected from outside.
type server struct {
	*node.Node
	client *kubernetes.Clientset
	name   string
	// args are the command lines of the components, from the server's log.
	args map[string]map[string]string
	// kubelet is the kubelet's configuration from /configz.
	kubelet map[string]any
	// etcd means that the datastore is a member of etcd.
	etcd bool
}

// look collects what the checks need from a server that is ready.
func look(t *testing.T, n *node.Node) *server {
	t.Helper()
	s := &server{Node: n, client: n.Client(t), args: map[string]map[string]string{}}
	report, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.name = report.Node
	text, err := os.ReadFile(n.Log())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		_, rest, ok := strings.Cut(line, "Running kube")
		if !ok {
			continue
		}
		component, flags, ok := strings.Cut(strings.TrimRight(rest, "\"\n"), " --")
		if !ok {
			continue
		}
		set := map[string]string{}
		for _, flag := range strings.Split(flags, " --") {
			name, value, _ := strings.Cut(flag, "=")
			set[name] = value
		}
		s.args["kube"+component] = set
	}
	for _, name := range []string{apiserver, controllers, scheduler} {
		if len(s.args[name]) == 0 {
			t.Fatalf("the log %s does not contain the flags of %s", n.Log(), name)
		}
	}
	for _, c := range report.Components {
		if c.Name == "datastore" {
			s.etcd = strings.HasPrefix(c.Version, "etcd ")
		}
	}
	answer := n.Kubectl(t, "get", "--raw", "/api/v1/nodes/"+s.name+"/proxy/configz")
	var configz struct{ Kubeletconfig map[string]any }
	if err := json.Unmarshal([]byte(answer), &configz); err != nil || len(configz.Kubeletconfig) == 0 {
		t.Fatalf("the kubelet's configuration: %v: %s", err, answer)
	}
	s.kubelet = configz.Kubeletconfig
	return s
}

const apiserver, controllers, scheduler = "kube-apiserver", "kube-controller-manager", "kube-scheduler"

// arg checks the value of a component's flag; absent is upstream's default.
func arg(component, name, absent string, good func(value string) bool) func(*server) Result {
	return func(s *server) Result {
		value, set := s.args[component][name]
		if !set {
			return verdict(good(absent), "%s: --%s is not set, the default is %q", component, name, absent)
		}
		return verdict(good(value), "%s: --%s=%s", component, name, strings.ReplaceAll(value, s.DataDir(), "<data-dir>"))
	}
}

func is(want string) func(string) bool { return func(v string) bool { return v == want } }

func isSet(value string) bool { return value != "" }

// lists checks that a comma-separated flag has this item, or does not have it.
func lists(item string, want bool) func(string) bool {
	return func(v string) bool { return slices.Contains(strings.Split(v, ","), item) == want }
}

// plugin checks an admission plugin. Plugins that are on by default are in upstream's list
// (pkg/kubeapiserver/options/plugins.go).
func plugin(name string, byDefault bool) func(*server) Result {
	return func(s *server) Result {
		args := s.args[apiserver]
		on := (byDefault || lists(name, true)(args["enable-admission-plugins"])) && !lists(name, true)(args["disable-admission-plugins"])
		return verdict(on, "enabled besides the defaults: %s; disabled: %q", args["enable-admission-plugins"], args["disable-admission-plugins"])
	}
}

// both returns Pass if all checks pass.
func both(checks ...func(*server) Result) func(*server) Result {
	return func(s *server) Result {
		var evidence []string
		for _, check := range checks {
			r := check(s)
			if r.Outcome != Pass {
				return r
			}
			evidence = append(evidence, r.Evidence)
		}
		return passed("%s", strings.Join(evidence, "; "))
	}
}

// kubelet checks a field of the kubelet's effective configuration, which omits empty fields.
func kubelet(path string, good func(value string) bool) func(*server) Result {
	return func(s *server) Result {
		var value any = s.kubelet
		for part := range strings.SplitSeq(path, ".") {
			m, _ := value.(map[string]any)
			value = m[part]
		}
		text := ""
		if value != nil {
			text = fmt.Sprint(value)
		}
		return verdict(good(text), "/configz: %s is %q", path, strings.ReplaceAll(text, s.DataDir(), "<data-dir>"))
	}
}

// mode checks that files exist and have no more permissions than these.
func mode(most fs.FileMode, patterns ...string) func(*server) Result {
	return files(patterns, func(info fs.FileInfo) string {
		if info.Mode().Perm()&^most != 0 {
			return fmt.Sprintf("has mode %o", info.Mode().Perm())
		}
		return ""
	}, fmt.Sprintf("%o or less", most))
}

// root checks that files belong to root.
func root(patterns ...string) func(*server) Result {
	return files(patterns, func(info fs.FileInfo) string {
		if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 0 || stat.Gid != 0 {
			return fmt.Sprintf("belongs to %d:%d", stat.Uid, stat.Gid)
		}
		return ""
	}, "root:root")
}

// files returns files below the data dir, or the run directory for "run:"; the admin's kubeconfig is "kubeconfig:".
func files(patterns []string, wrong func(fs.FileInfo) string, right string) func(*server) Result {
	return func(s *server) Result {
		for _, pattern := range patterns {
			full := s.Layout().Path(pattern)
			if rest, ok := strings.CutPrefix(pattern, "run:"); ok {
				full = filepath.Join(s.Layout().Run(), rest)
			} else if pattern == "kubeconfig:" {
				full = s.Kubeconfig()
			}
			found, err := filepath.Glob(full)
			if err != nil || len(found) == 0 {
				return failed("%s does not exist (%v)", pattern, err)
			}
			for _, path := range found {
				info, err := os.Stat(path)
				if errors.Is(err, fs.ErrNotExist) {
					continue // a pod's address that was released meanwhile
				}
				if err != nil {
					return failed("%v", err)
				}
				if problem := wrong(info); problem != "" {
					return failed("%s %s", pattern, problem)
				}
			}
		}
		return passed("%s: %s", strings.Join(patterns, ", "), right)
	}
}

// strong checks with real handshakes that a port only accepts the benchmark's cipher suites.
func strong(port int) func(*server) Result {
	good := []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	return func(s *server) Result {
		shake := func(c *tls.Config) error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			conn, err := s.Dial(ctx, "tcp", net.JoinHostPort(s.Address(), fmt.Sprint(port)))
			if err != nil {
				return err
			}
			defer conn.Close()
			c.InsecureSkipVerify = true
			return tls.Client(conn, c).HandshakeContext(ctx)
		}
		if err := shake(&tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12, CipherSuites: good}); err != nil {
			return failed("port %d accepts none of the strong suites: %v", port, err)
		}
		for _, suite := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
			if slices.Contains(good, suite.ID) || !slices.Contains(suite.SupportedVersions, uint16(tls.VersionTLS12)) {
				continue
			}
			if shake(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{suite.ID}}) == nil {
				return failed("port %d accepts %s", port, suite.Name)
			}
		}
		if shake(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}) == nil {
			return failed("port %d accepts TLS 1.1", port)
		}
		return passed("handshakes with port %d: TLS 1.2 and later, ECDHE with AES-GCM or ChaCha20 only", port)
	}
}

// closed checks that nothing listens at the node's address.
func closed(port int) func(*server) Result {
	return func(s *server) Result {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		conn, err := s.Dial(ctx, "tcp", net.JoinHostPort(s.Address(), fmt.Sprint(port)))
		if err == nil {
			conn.Close()
			return failed("port %d accepts connections at %s", port, s.Address())
		}
		return verdict(errors.Is(err, syscall.ECONNREFUSED), "port %d at the node's address: %v", port, errors.Unwrap(errors.Unwrap(err)))
	}
}

// anonymous checks the response to a client without credentials.
func anonymous(port int, paths ...string) func(*server) Result {
	return func(s *server) Result {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DialContext: s.Dial, DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		}}
		for _, path := range paths {
			url := fmt.Sprintf("https://%s%s", net.JoinHostPort(s.Address(), fmt.Sprint(port)), path)
			resp, err := client.Get(url)
			if err != nil {
				return failed("%s: %v", path, err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				return failed("%s returns %s", path, resp.Status)
			}
		}
		return passed("port %d returns 401 Unauthorized for %s", port, strings.Join(paths, ", "))
	}
}

// pods checks every pod in the cluster's own namespaces.
func pods(wrong func(corev1.PodSpec) bool, right string) func(*server) Result {
	return func(s *server) Result {
		list, err := s.client.CoreV1().Pods(metav1.NamespaceAll).List(context.Background(), metav1.ListOptions{})
		if err != nil || len(list.Items) == 0 {
			return failed("list pods: %d, %v", len(list.Items), err)
		}
		for _, p := range list.Items {
			if wrong(p.Spec) {
				return failed("pod %s/%s", p.Namespace, p.Name)
			}
		}
		return passed("no pod of a new server %s", right)
	}
}

// containers reports whether the condition holds for any container of a pod.
func containers(p corev1.PodSpec, is func(corev1.Container) bool) bool {
	return slices.ContainsFunc(append(slices.Clone(p.InitContainers), p.Containers...), is)
}

func none(reason string) func(*server) Result {
	return func(*server) Result { return Result{NotApplicable, reason} }
}

func judge(reason string) func(*server) Result {
	return func(*server) Result { return Result{Warn, reason} }
}

// onEtcd audits a server whose datastore is a member of etcd by one check, and others by another.
func onEtcd(with, without func(*server) Result) func(*server) Result {
	return func(s *server) Result {
		if s.etcd {
			return with(s)
		}
		return without(s)
	}
}

// etcd is a check that only applies to a server with etcd.
func etcd(check func(*server) Result) func(*server) Result { return onEtcd(check, none(withSQLite)) }

// onLoopback checks that a component listens on no port, or on loopback.
func onLoopback(component, port string) func(*server) Result {
	return onEtcd(arg(component, "bind-address", "0.0.0.0", is("127.0.0.1")), arg(component, "secure-port", port, is("0")))
}

// etcdAddress is the address of etcd: that for clients is on loopback.
func (s *server) etcdAddress(port int) string {
	host := "127.0.0.1"
	if port == layout.EtcdPeerPort {
		host = s.Address()
	}
	return net.JoinHostPort(host, fmt.Sprint(port))
}

// etcdGet sends a request to etcd without a certificate.
func (s *server) etcdGet(port int, c *tls.Config) error {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: s.Dial, DisableKeepAlives: true, TLSClientConfig: c}}
	resp, err := client.Get("https://" + s.etcdAddress(port) + "/version")
	if err == nil {
		resp.Body.Close()
	}
	return err
}

// etcdRejects checks that etcd rejects clients without a certificate.
func etcdRejects(port int) func(*server) Result {
	return func(s *server) Result {
		err := s.etcdGet(port, &tls.Config{InsecureSkipVerify: true})
		var alert tls.AlertError
		return verdict(errors.As(err, &alert), "port %d, a request without a certificate: %v", port, errors.Unwrap(err))
	}
}

// etcdCertificate checks that etcd's certificate is from its own authority, and not one that etcd has made itself.
func etcdCertificate(port int) func(*server) Result {
	return func(s *server) Result {
		text, err := os.ReadFile(certificate.Store(s.Layout().TLS()).Cert(certificate.EtcdCA))
		if err != nil {
			return failed("%v", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return failed("the certificate of %s cannot be read", certificate.EtcdCA)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		conn, err := s.Dial(ctx, "tcp", s.etcdAddress(port))
		if err != nil {
			return failed("%v", err)
		}
		defer conn.Close()
		host, _, _ := net.SplitHostPort(s.etcdAddress(port))
		if err := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host}).HandshakeContext(ctx); err != nil {
			return failed("port %d: %v", port, err)
		}
		return passed("port %d serves TLS with a certificate of %s", port, certificate.EtcdCA)
	}
}

// etcdAuthority checks that etcd's authority is none of the cluster's other ones.
func etcdAuthority(s *server) Result {
	store := certificate.Store(s.Layout().TLS())
	own, err := os.ReadFile(store.Cert(certificate.EtcdCA))
	if err != nil {
		return failed("%v", err)
	}
	for _, name := range []string{certificate.ServerCA, certificate.ClientCA, certificate.RequestHeaderCA, certificate.KubeletCA} {
		other, err := os.ReadFile(store.Cert(name))
		if err != nil {
			return failed("%v", err)
		}
		if bytes.Equal(own, other) {
			return failed("%s and %s are the same", certificate.EtcdCA, name)
		}
	}
	trusted := filepath.Base(s.args[apiserver]["client-ca-file"])
	return verdict(trusted != certificate.EtcdCA+".crt", "etcd trusts %s.crt only, and the API server trusts %s", certificate.EtcdCA, trusted)
}
