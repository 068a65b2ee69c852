//go:build e2e

package cis

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/layout"
)

// Check is one check of the CIS Kubernetes Benchmark. Numbers, titles and the classification as automated are those of
// K3s's self-assessment for the 1.36 line (docs.k3s.io/security/self-assessment-2.1).
type Check struct {
	Number, Title string
	Automated     bool
	// K3s is the outcome of K3s as installed, without its hardening guide.
	K3s   Outcome
	Audit func(*server) Result
}

const (
	oneProcess = "the component runs inside the server process, without such a file"
	// withSQLite is why the checks of etcd do not apply to a server without --cluster-init.
	withSQLite = "the datastore is SQLite, behind a UNIX socket that only root can open; see the column with etcd"
	inServer   = "etcd runs inside the server process, as root, and its data belongs to root"
	renewed    = "the server creates and renews the kubelet's certificates"
)

// checks are all checks, in the benchmark's order.
func checks() []Check {
	const auto, manual = true, false
	cred := func(name string) string { return "server/cred/" + name + ".kubeconfig" }
	return []Check{
		{"1.1.1", "API server pod specification file permissions", auto, NotApplicable, none(oneProcess)},
		{"1.1.2", "API server pod specification file ownership", auto, NotApplicable, none(oneProcess)},
		{"1.1.3", "Controller manager pod specification file permissions", auto, NotApplicable, none(oneProcess)},
		{"1.1.4", "Controller manager pod specification file ownership", auto, NotApplicable, none(oneProcess)},
		{"1.1.5", "Scheduler pod specification file permissions", auto, NotApplicable, none(oneProcess)},
		{"1.1.6", "Scheduler pod specification file ownership", auto, NotApplicable, none(oneProcess)},
		{"1.1.7", "etcd pod specification file permissions", auto, NotApplicable, none(oneProcess)},
		{"1.1.8", "etcd pod specification file ownership", auto, NotApplicable, none(oneProcess)},
		{"1.1.9", "Container Network Interface file permissions are 600 or less", manual, Pass, mode(0o600, "run:cni/*/[0-9]*")},
		{"1.1.10", "Container Network Interface file ownership is root:root", manual, Pass, root("run:cni/*/*", "agent/etc/cni/net.d/*")},
		{"1.1.11", "Data directory of the datastore has 700 or less", auto, Pass, both(mode(0o700, "server/db"), onEtcd(both(mode(0o700, "server/db/etcd"), mode(0o600, "server/db/etcd/member/*/*")), mode(0o600, "server/db/state.db")))},
		{"1.1.12", "Data directory of etcd belongs to etcd:etcd", auto, NotApplicable, onEtcd(none(inServer), none(withSQLite))},
		{"1.1.13", "Administrative credential file permissions are 600", auto, Pass, mode(0o600, "kubeconfig:", cred("polymesh"))},
		{"1.1.14", "Administrative credential file ownership is root:root", auto, Pass, root("kubeconfig:", cred("polymesh"))},
		{"1.1.15", "Scheduler's kubeconfig has 600 or less", auto, Pass, mode(0o600, cred(scheduler))},
		{"1.1.16", "Scheduler's kubeconfig belongs to root:root", auto, Pass, root(cred(scheduler))},
		{"1.1.17", "Controller manager's kubeconfig has 600 or less", auto, Pass, mode(0o600, cred(controllers))},
		{"1.1.18", "Controller manager's kubeconfig belongs to root:root", auto, Pass, root(cred(controllers))},
		{"1.1.19", "PKI directory and files belong to root:root", auto, Pass, root("server/tls", "server/tls/*")},
		{"1.1.20", "PKI certificate files have 644 or less", manual, Pass, mode(0o644, "server/tls/*.crt")},
		{"1.1.21", "PKI key files have 600", manual, Pass, mode(0o600, "server/tls/*.key")},

		{"1.2.1", "Anonymous requests to the API server are restricted", manual, Pass, both(arg(apiserver, "anonymous-auth", "true", is("false")), anonymous(6443, "/", "/healthz", "/metrics", "/api"))},
		{"1.2.2", "--token-auth-file is not set", auto, Pass, arg(apiserver, "token-auth-file", "", is(""))},
		{"1.2.3", "DenyServiceExternalIPs is set", manual, Warn, plugin("DenyServiceExternalIPs", false)},
		{"1.2.4", "--kubelet-client-certificate and --kubelet-client-key", auto, Pass, both(arg(apiserver, "kubelet-client-certificate", "", isSet), arg(apiserver, "kubelet-client-key", "", isSet))},
		{"1.2.5", "--kubelet-certificate-authority", auto, Pass, arg(apiserver, "kubelet-certificate-authority", "", isSet)},
		{"1.2.6", "--authorization-mode is not AlwaysAllow", auto, Pass, arg(apiserver, "authorization-mode", "AlwaysAllow", lists("AlwaysAllow", false))},
		{"1.2.7", "--authorization-mode includes Node", auto, Pass, arg(apiserver, "authorization-mode", "AlwaysAllow", lists("Node", true))},
		{"1.2.8", "--authorization-mode includes RBAC", auto, Pass, arg(apiserver, "authorization-mode", "AlwaysAllow", lists("RBAC", true))},
		{"1.2.9", "EventRateLimit is set", manual, Warn, plugin("EventRateLimit", false)},
		{"1.2.10", "AlwaysAdmit is not set", auto, Pass, arg(apiserver, "enable-admission-plugins", "", lists("AlwaysAdmit", false))},
		{"1.2.11", "AlwaysPullImages is set", manual, Warn, judge("with it, a pod with an image of a registry does not start while the registry does not respond")},
		{"1.2.12", "ServiceAccount is set", auto, Pass, plugin("ServiceAccount", true)},
		{"1.2.13", "NamespaceLifecycle is set", auto, Pass, plugin("NamespaceLifecycle", true)},
		{"1.2.14", "NodeRestriction is set", auto, Pass, plugin("NodeRestriction", false)},
		{"1.2.15", "--profiling is false", auto, Pass, arg(apiserver, "profiling", "true", is("false"))},
		{"1.2.16", "--audit-log-path is set", auto, Fail, both(arg(apiserver, "audit-log-path", "", isSet), mode(0o600, "server/logs/audit.log"))},
		{"1.2.17", "--audit-log-maxage is 30 or as appropriate", auto, Fail, arg(apiserver, "audit-log-maxage", "", is("30"))},
		{"1.2.18", "--audit-log-maxbackup is 10 or as appropriate", auto, Fail, arg(apiserver, "audit-log-maxbackup", "", is("10"))},
		{"1.2.19", "--audit-log-maxsize is 100 or as appropriate", auto, Fail, arg(apiserver, "audit-log-maxsize", "", is("100"))},
		{"1.2.20", "--request-timeout is appropriate", manual, Pass, arg(apiserver, "request-timeout", "1m0s", is("1m0s"))},
		{"1.2.21", "--service-account-lookup is true", auto, Pass, arg(apiserver, "service-account-lookup", "true", is("true"))},
		{"1.2.22", "--service-account-key-file", auto, Pass, arg(apiserver, "service-account-key-file", "", isSet)},
		{"1.2.23", "--etcd-certfile and --etcd-keyfile", auto, Pass, etcd(both(arg(apiserver, "etcd-certfile", "", isSet), arg(apiserver, "etcd-keyfile", "", isSet)))},
		{"1.2.24", "--tls-cert-file and --tls-private-key-file", auto, Pass, both(arg(apiserver, "tls-cert-file", "", isSet), arg(apiserver, "tls-private-key-file", "", isSet))},
		{"1.2.25", "--client-ca-file", auto, Pass, arg(apiserver, "client-ca-file", "", isSet)},
		{"1.2.26", "--etcd-cafile", auto, Pass, etcd(arg(apiserver, "etcd-cafile", "", isSet))},
		{"1.2.27", "--encryption-provider-config", manual, Fail, both(arg(apiserver, "encryption-provider-config", "", isSet), encrypted)},
		{"1.2.28", "Encryption providers are appropriately configured", manual, Fail, encrypted},
		{"1.2.29", "The API server uses strong cryptographic ciphers only", manual, Pass, strong(6443)},
		{"1.2.30", "--service-account-extend-token-expiration is false", auto, Fail, arg(apiserver, "service-account-extend-token-expiration", "true", is("false"))},

		{"1.3.1", "--terminated-pod-gc-threshold is appropriate", manual, Warn, arg(controllers, "terminated-pod-gc-threshold", "12500", func(v string) bool { return v != "12500" })},
		{"1.3.2", "--profiling is false", auto, Pass, arg(controllers, "profiling", "true", is("false"))},
		{"1.3.3", "--use-service-account-credentials is true", auto, Pass, arg(controllers, "use-service-account-credentials", "false", is("true"))},
		{"1.3.4", "--service-account-private-key-file", auto, Pass, arg(controllers, "service-account-private-key-file", "", isSet)},
		{"1.3.5", "--root-ca-file", auto, Pass, arg(controllers, "root-ca-file", "", isSet)},
		{"1.3.6", "RotateKubeletServerCertificate is true", auto, NotApplicable, none(renewed)},
		{"1.3.7", "--bind-address is 127.0.0.1", auto, Pass, both(onLoopback(controllers, "10257"), closed(10257))},
		{"1.4.1", "--profiling is false", auto, Pass, arg(scheduler, "profiling", "true", is("false"))},
		{"1.4.2", "--bind-address is 127.0.0.1", auto, Pass, both(onLoopback(scheduler, "10259"), closed(10259))},

		{"2.1", "etcd: --cert-file and --key-file", auto, NotApplicable, etcd(etcdCertificate(layout.EtcdClientPort))},
		{"2.2", "etcd: --client-cert-auth", auto, NotApplicable, etcd(etcdRejects(layout.EtcdClientPort))},
		{"2.3", "etcd: --auto-tls", auto, NotApplicable, etcd(etcdCertificate(layout.EtcdClientPort))},
		{"2.4", "etcd: --peer-cert-file and --peer-key-file", auto, NotApplicable, etcd(etcdCertificate(layout.EtcdPeerPort))},
		{"2.5", "etcd: --peer-client-cert-auth", auto, NotApplicable, etcd(etcdRejects(layout.EtcdPeerPort))},
		{"2.6", "etcd: --peer-auto-tls", auto, NotApplicable, etcd(etcdCertificate(layout.EtcdPeerPort))},
		{"2.7", "etcd: a certificate authority of its own", auto, NotApplicable, etcd(etcdAuthority)},

		{"3.1.1", "Client certificates are not used for users", manual, Warn, judge("the administrator's kubeconfig has one; OIDC works with --kube-apiserver-arg")},
		{"3.1.2", "Service account tokens are not used for users", manual, Warn, judge("the server creates none for users")},
		{"3.1.3", "Bootstrap tokens are not used for users", manual, Warn, arg(apiserver, "enable-bootstrap-token-auth", "false", is("false"))},
		{"3.2.1", "There is a minimal audit policy", manual, Fail, arg(apiserver, "audit-policy-file", "", isSet)},
		{"3.2.2", "The audit policy covers key security concerns", manual, Warn, judge("the built-in policy logs the metadata of every request for Secrets, tokens, RBAC and exec; see the hardening page")},

		{"4.1.1", "Kubelet service file permissions", auto, NotApplicable, none(oneProcess)},
		{"4.1.2", "Kubelet service file ownership", auto, NotApplicable, none(oneProcess)},
		{"4.1.3", "Proxy's kubeconfig has 600 or less", manual, Pass, mode(0o600, cred("kube-proxy"))},
		{"4.1.4", "Proxy's kubeconfig belongs to root:root", manual, Pass, root(cred("kube-proxy"))},
		{"4.1.5", "Kubelet's kubeconfig has 600 or less", auto, Pass, mode(0o600, cred("kubelet"))},
		{"4.1.6", "Kubelet's kubeconfig belongs to root:root", auto, Pass, root(cred("kubelet"))},
		{"4.1.7", "Certificate authority files have 644 or less", manual, Pass, mode(0o644, "server/tls/*ca.crt")},
		{"4.1.8", "Certificate authority files belong to root:root", manual, Pass, root("server/tls/*ca.crt")},
		{"4.1.9", "Kubelet's configuration file has 600 or less", auto, Pass, none("the kubelet is configured in memory")},
		{"4.1.10", "Kubelet's configuration file belongs to root:root", auto, Pass, none("the kubelet is configured in memory")},

		{"4.2.1", "--anonymous-auth is false", auto, Pass, both(kubelet("authentication.anonymous.enabled", is("false")), anonymous(10250, "/pods", "/metrics", "/logs/"))},
		{"4.2.2", "--authorization-mode is not AlwaysAllow", auto, Pass, kubelet("authorization.mode", is("Webhook"))},
		{"4.2.3", "--client-ca-file", auto, Pass, kubelet("authentication.x509.clientCAFile", isSet)},
		{"4.2.4", "--read-only-port is 0", auto, Pass, both(kubelet("readOnlyPort", func(v string) bool { return v == "" || v == "0" }), closed(10255))},
		{"4.2.5", "--streaming-connection-idle-timeout is not 0", manual, Pass, kubelet("streamingConnectionIdleTimeout", func(v string) bool { return v != "" && v != "0s" && v != "0" })},
		{"4.2.6", "--make-iptables-util-chains is true", auto, Pass, utilChains},
		{"4.2.7", "--hostname-override is not set", manual, NotApplicable, judge("set, as by K3s: certificates and the node's name have the same value")},
		{"4.2.8", "eventRecordQPS ensures event capture", manual, Pass, kubelet("eventRecordQPS", func(v string) bool { return v != "" && v != "0" })},
		{"4.2.9", "--tls-cert-file and --tls-private-key-file", auto, Pass, both(kubelet("tlsCertFile", isSet), kubelet("tlsPrivateKeyFile", isSet))},
		{"4.2.10", "--rotate-certificates is not false", auto, Pass, none(renewed)},
		{"4.2.11", "RotateKubeletServerCertificate is true", auto, Pass, none(renewed)},
		{"4.2.12", "The kubelet uses strong cryptographic ciphers only", manual, Pass, strong(10250)},
		{"4.2.13", "There is a limit on pod PIDs", manual, Warn, kubelet("podPidsLimit", func(v string) bool { return v != "" && v != "-1" })},
		{"4.2.14", "--seccomp-default is true", manual, Warn, arg("kubelet", "seccomp-default", "false", is("true"))},
		{"4.3.1", "kube-proxy's metrics are on the loopback", auto, Pass, closed(10249)},

		{"5.1.1", "cluster-admin is used only where required", manual, Pass, clusterAdmins},
		{"5.1.2", "Access to Secrets is minimized", manual, Warn, judge("istiod and istio-reader read all Secrets, as upstream installs them; the image policy gets pull secrets by name")},
		{"5.1.3", "Wildcards in Roles and ClusterRoles are minimized", manual, Warn, judge("none in the add-ons' roles; Kubernetes' own cluster-admin and controllers have them")},
		{"5.1.4", "Access to create pods is minimized", manual, Warn, judge("local-path-provisioner, only in kube-system, and istiod, by Deployments for Gateway API")},
		{"5.1.5", "Default service accounts are not used", manual, Warn, pods(func(p corev1.PodSpec) bool { return p.ServiceAccountName == "" || p.ServiceAccountName == "default" }, "uses the default service account")},
		{"5.1.6", "Tokens are mounted only where necessary", manual, Warn, judge("`polymesh new` disables the mount in its services")},
		{"5.1.7", "The group system:masters is avoided", manual, Warn, judge("the administrator's certificate and the one with which the server applies its add-ons are in it; its other parts have their own roles")},
		{"5.1.8", "Bind, impersonate and escalate are limited", manual, Warn, judge("none in the add-ons' roles")},
		{"5.1.9", "Access to create persistent volumes is minimized", manual, Warn, judge("only local-path-provisioner, limited to its folder by an admission policy")},
		{"5.1.10", "Access to the proxy sub-resource of nodes is minimized", manual, Warn, judge("the API server's client for kubelets; none in the add-ons' roles")},
		{"5.1.11", "Access to approve certificate signing requests is minimized", manual, Warn, judge("none in the add-ons' roles")},
		{"5.1.12", "Access to webhook configurations is minimized", manual, Warn, judge("istiod and the image policy, for their own")},
		{"5.1.13", "Access to create service account tokens is minimized", manual, Warn, judge("none in the add-ons' roles")},

		{"5.2.1", "There is an active policy control mechanism", manual, Warn, plugin("PodSecurity", true)},
		{"5.2.2", "Privileged containers", manual, Pass, pods(func(p corev1.PodSpec) bool {
			return containers(p, func(c corev1.Container) bool {
				return c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
			})
		}, "has one; --pod-security rejects them elsewhere")},
		{"5.2.3", "Containers in the host's process ID namespace", manual, Pass, pods(func(p corev1.PodSpec) bool { return p.HostPID }, "is in it")},
		{"5.2.4", "Containers in the host's IPC namespace", manual, Pass, pods(func(p corev1.PodSpec) bool { return p.HostIPC }, "is in it")},
		{"5.2.5", "Containers in the host's network namespace", manual, Pass, pods(func(p corev1.PodSpec) bool { return p.HostNetwork }, "is in it")},
		{"5.2.6", "Containers with allowPrivilegeEscalation", manual, Pass, pods(func(p corev1.PodSpec) bool {
			return containers(p, func(c corev1.Container) bool {
				return c.SecurityContext != nil && c.SecurityContext.AllowPrivilegeEscalation != nil && *c.SecurityContext.AllowPrivilegeEscalation
			})
		}, "requests it")},
		{"5.2.7", "Root containers", manual, Warn, judge("--pod-security restricted rejects them")},
		{"5.2.8", "Containers with NET_RAW", manual, Warn, judge("--pod-security restricted rejects them; otherwise every container has it, as containerd's default")},
		{"5.2.9", "Containers with capabilities", manual, Warn, judge("--pod-security restricted rejects them")},
		{"5.2.10", "Windows HostProcess containers", manual, Warn, none("there are no Windows nodes")},
		{"5.2.11", "HostPath volumes", manual, Warn, judge("--pod-security baseline rejects them")},
		{"5.2.12", "Containers with HostPorts", manual, Warn, judge("--pod-security baseline rejects them")},
		{"5.2.13", "Containers with unmasked procMount", manual, Warn, judge("--pod-security baseline rejects them")},
		{"5.3.1", "The CNI supports NetworkPolicies", manual, Pass, func(s *server) Result {
			report, err := s.Report(context.Background())
			if err != nil {
				return failed("%v", err)
			}
			for _, c := range report.Components {
				if c.Name == "network-policy" {
					return verdict(c.State == component.Ready && c.Message == "" && len(c.Notes) == 0, "every node enforces them: network-policy is %s", strings.TrimSpace(string(c.State)+" "+c.Message+" "+strings.Join(c.Notes, " ")))
				}
			}
			return failed("no component enforces them")
		}},
		{"5.3.2", "All namespaces have NetworkPolicies", manual, Warn, judge("a new server has none: create one for each of your namespaces")},
		{"5.4.1", "Secrets as files, not as environment variables", manual, Warn, judge("the apps' choice")},
		{"5.4.2", "External Secret storage", manual, Warn, judge("the administrator's choice")},
		{"5.5.1", "Image provenance", manual, Warn, judge("with --image-policy-key, unsigned images are rejected")},
		{"5.6.1", "Boundaries by namespaces", manual, Warn, judge("`polymesh deploy` deploys each project to its own namespace")},
		{"5.6.2", "Seccomp profile is the runtime's default", manual, Warn, arg("kubelet", "seccomp-default", "false", is("true"))},
		{"5.6.3", "Security contexts", manual, Warn, judge("`polymesh new` sets them in its services")},
		{"5.6.4", "The default namespace is not used", manual, Warn, func(s *server) Result {
			list, err := s.client.CoreV1().Pods(metav1.NamespaceDefault).List(context.Background(), metav1.ListOptions{})
			return verdict(err == nil && len(list.Items) == 0, "pods in default on a new server: %d (%v)", len(list.Items), err)
		}},
	}
}

// encrypted reads the API server's encryption configuration.
func encrypted(s *server) Result {
	text, err := os.ReadFile(s.Layout().EncryptionFile())
	if err != nil {
		return failed("%v", err)
	}
	if r := mode(0o600, "server/cred/encryption-config.json")(s); r.Outcome != Pass {
		return r
	}
	_, providers, _ := strings.Cut(string(text), "providers:")
	first, _, _ := strings.Cut(strings.TrimLeft(providers, " \n-"), ":")
	return verdict(slices.Contains([]string{"aescbc", "kms", "secretbox"}, first), "the first provider in encryption-config.json, which has mode 600, is %s", first)
}

// utilChains: these are iptables chains. With kube-proxy's nftables mode they are unused.
func utilChains(s *server) Result {
	r := kubelet("makeIPTablesUtilChains", is("true"))(s)
	if r.Outcome != Pass {
		return Result{NotApplicable, "kube-proxy uses nftables, so these chains are not used"}
	}
	return r
}

// clusterAdmins lists the subjects with the role.
func clusterAdmins(s *server) Result {
	bindings, err := s.client.RbacV1().ClusterRoleBindings().List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return failed("%v", err)
	}
	var who []string
	for _, b := range bindings.Items {
		if b.RoleRef.Name == "cluster-admin" {
			for _, subject := range b.Subjects {
				who = append(who, fmt.Sprintf("%s %s", subject.Kind, subject.Name))
			}
		}
	}
	return verdict(slices.Equal(who, []string{rbacv1.GroupKind + " system:masters"}), "bound to %s", strings.Join(who, ", "))
}
