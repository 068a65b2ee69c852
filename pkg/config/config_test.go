package config

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// example holds, for each flag, a value other than its default, and its effect on the result.
var example = map[string]struct {
	value string
	shows func(*Server) bool
}{
	"data-dir":                          {"/srv/polymesh", func(s *Server) bool { return s.DataDir == "/srv/polymesh" }},
	"write-kubeconfig":                  {"/srv/admin.yaml", func(s *Server) bool { return s.Kubeconfig == "/srv/admin.yaml" }},
	"write-kubeconfig-mode":             {"0644", func(s *Server) bool { return s.KubeconfigMode == 0o644 }},
	"write-kubeconfig-group":            {"0", func(s *Server) bool { return s.KubeconfigGroup == 0 && s.KubeconfigMode == 0o640 }},
	"datastore-sync":                    {"normal", func(s *Server) bool { return s.DatastoreSync == SyncNormal }},
	"node-name":                         {"1.10", func(s *Server) bool { return s.NodeName == "1.10" }},
	"node-ip":                           {"192.0.2.7", func(s *Server) bool { return s.NodeIP == netip.MustParseAddr("192.0.2.7") }},
	"node-external-ip":                  {"198.51.100.7", func(s *Server) bool { return s.ExternalIP == netip.MustParseAddr("198.51.100.7") }},
	"node-label":                        {"disk=ssd", func(s *Server) bool { return slices.Equal(s.NodeLabels, []string{"disk=ssd"}) }},
	"node-taint":                        {"CriticalAddonsOnly=true:NoExecute", func(s *Server) bool { return slices.Equal(s.NodeTaints, []string{"CriticalAddonsOnly=true:NoExecute"}) }},
	"bind-address":                      {"127.0.0.1", func(s *Server) bool { return s.BindAddress == netip.MustParseAddr("127.0.0.1") }},
	"advertise-address":                 {"192.0.2.8", func(s *Server) bool { return s.AdvertiseAddress == netip.MustParseAddr("192.0.2.8") }},
	"https-listen-port":                 {"7443", func(s *Server) bool { return s.HTTPSPort == 7443 }},
	"tls-san":                           {"api.example.com", func(s *Server) bool { return slices.Equal(s.TLSSANs, []string{"api.example.com"}) }},
	"cluster-cidr":                      {"10.60.0.0/16", func(s *Server) bool { return s.ClusterCIDR == netip.MustParsePrefix("10.60.0.0/16") }},
	"service-cidr":                      {"10.61.0.0/16", func(s *Server) bool { return s.ClusterDNS == netip.MustParseAddr("10.61.0.10") }},
	"cluster-dns":                       {"10.43.0.53", func(s *Server) bool { return s.ClusterDNS == netip.MustParseAddr("10.43.0.53") }},
	"cluster-domain":                    {"cluster.example", func(s *Server) bool { return s.ClusterDomain == "cluster.example" }},
	"service-node-port-range":           {"20000-20100", func(s *Server) bool { return s.NodePortRange == "20000-20100" }},
	"flannel-backend":                   {"host-gw", func(s *Server) bool { return s.FlannelBackend == HostGW }},
	"flannel-port":                      {"4789", func(s *Server) bool { return s.FlannelPort == 4789 }},
	"flannel-external-ip":               {"true", func(s *Server) bool { return s.FlannelExternalIP }},
	"flannel-iface":                     {"eth1", func(s *Server) bool { return s.FlannelIface == "eth1" }},
	"resolv-conf":                       {"/srv/resolv.conf", func(s *Server) bool { return s.ResolvConf == "/srv/resolv.conf" }},
	"secrets-encryption":                {"true", func(s *Server) bool { return s.SecretsEncryption }},
	"secrets-encryption-provider":       {"aescbc", func(s *Server) bool { return s.EncryptionProvider == "aescbc" }},
	"audit-log":                         {"true", func(s *Server) bool { return s.AuditLog }},
	"audit-policy-file":                 {"/srv/audit.yaml", func(s *Server) bool { return s.AuditLog && s.AuditPolicyFile == "/srv/audit.yaml" }},
	"pod-security":                      {"baseline", func(s *Server) bool { return s.PodSecurity == "baseline" }},
	"protect-kernel-defaults":           {"true", func(s *Server) bool { return s.ProtectKernelDefaults }},
	"private-registry":                  {"/srv/registries.yaml", func(s *Server) bool { return s.PrivateRegistry == "/srv/registries.yaml" }},
	"disable-default-registry-endpoint": {"true", func(s *Server) bool { return s.DisableDefaultEndpoint }},
	"embedded-registry":                 {"true", func(s *Server) bool { return s.EmbeddedRegistry }},
	"disable-network-policy":            {"true", func(s *Server) bool { return s.DisableNetworkPolicy }},
	"disable":                           {"servicelb", func(s *Server) bool { return !s.Enabled(ServiceLB) && s.Enabled(CoreDNS) }},
	"loadbalancer-pool":                 {"192.0.2.64/28", func(s *Server) bool { return s.LoadBalancerPool[0].From == netip.MustParseAddr("192.0.2.65") }},
	"image-policy-key":                  {"base64:MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEG8vgnEzyeVNwxC4jcsYqEFGpLE1kZWojUFjGHFp67JZGz7urXnLcMGaCQkC6P+BZhdxPD5cY8QmRvHwfU4+xww==", func(s *Server) bool { return len(s.ImagePolicyKeys) == 1 }},
	"mesh-profile":                      {"demo", func(s *Server) bool { return s.MeshProfile == "demo" }},
	"observe-disk":                      {"3GiB", func(s *Server) bool { return s.Observe.Disk == 3<<30 }},
	"observe-memory":                    {"1GiB", func(s *Server) bool { return s.Observe.Memory == 1<<30 }},
	"observe-retention":                 {"30d", func(s *Server) bool { return s.Observe.Retention == 720*time.Hour }},
	"observe-remote-write":              {"true", func(s *Server) bool { return s.Observe.RemoteWrite }},
	"observe-cluster-access":            {"ingest", func(s *Server) bool { return s.ObserveAccess == ObserveIngest }},
	"kube-apiserver-arg":                {"audit-log-path=/a,b", func(s *Server) bool { return slices.Equal(s.APIServerArgs, []string{"audit-log-path=/a,b"}) }},
	"kube-controller-manager-arg":       {"v=2", func(s *Server) bool { return slices.Equal(s.ControllerManagerArgs, []string{"v=2"}) }},
	"kube-scheduler-arg":                {"v=3", func(s *Server) bool { return slices.Equal(s.SchedulerArgs, []string{"v=3"}) }},
	"kubelet-arg":                       {"feature-gates=A=true,B=false", func(s *Server) bool { return slices.Equal(s.KubeletArgs, []string{"feature-gates=A=true,B=false"}) }},
	"kube-proxy-arg":                    {"v=4", func(s *Server) bool { return slices.Equal(s.ProxyArgs, []string{"v=4"}) }},
	"disable-snapshots":                 {"true", func(s *Server) bool { return s.Snapshots.Disabled }},
	"snapshot-schedule":                 {"30 3 * * 1", func(s *Server) bool { return s.Snapshots.Schedule == "30 3 * * 1" }},
	"snapshot-retention":                {"9", func(s *Server) bool { return s.Snapshots.Retention == 9 }},
	"snapshot-dir":                      {"/srv/snapshots", func(s *Server) bool { return s.Snapshots.Dir == "/srv/snapshots" }},
	"snapshot-passphrase-file":          {"testdata/secret", func(s *Server) bool { return s.Snapshots.Passphrase == "hunter2" }},
	"s3":                                {"true", s3(func(b *S3) bool { return b.Endpoint == "s3.amazonaws.com" })},
	"s3-bucket":                         {"b-2", s3(func(b *S3) bool { return b.Bucket == "b-2" })},
	"s3-endpoint":                       {"s3.example.com:8443", s3(func(b *S3) bool { return b.Endpoint == "s3.example.com:8443" })},
	"s3-endpoint-ca":                    {"/srv/ca.pem", s3(func(b *S3) bool { return b.CAFile == "/srv/ca.pem" })},
	"s3-skip-ssl-verify":                {"true", s3(func(b *S3) bool { return b.SkipVerify })},
	"s3-insecure":                       {"true", s3(func(b *S3) bool { return b.Insecure })},
	"s3-access-key":                     {"id", s3(func(b *S3) bool { return b.AccessKey == "id" })},
	"s3-access-key-file":                {"testdata/secret", s3(func(b *S3) bool { return b.AccessKey == "hunter2" })},
	"s3-secret-key":                     {"secret", s3(func(b *S3) bool { return b.SecretKey == "secret" })},
	"s3-secret-key-file":                {"testdata/secret", s3(func(b *S3) bool { return b.SecretKey == "hunter2" })},
	"s3-region":                         {"eu-west-1", s3(func(b *S3) bool { return b.Region == "eu-west-1" })},
	"s3-folder":                         {"/clusters/a/", s3(func(b *S3) bool { return b.Folder == "clusters/a" })},
	"s3-timeout":                        {"90s", s3(func(b *S3) bool { return b.Timeout == 90*time.Second })},
	"v":                                 {"5", func(s *Server) bool { return s.LogLevel == 5 }},
	"debug":                             {"true", func(s *Server) bool { return s.Debug }},
	"cluster-init":                      {"true", func(s *Server) bool { return s.ClusterInit }},
	"datastore-endpoint":                {"etcd://a:2379,etcd://b", func(s *Server) bool { return s.Datastore.Endpoint == "http://a:2379,http://b:2379" }},
	"datastore-cafile":                  {"/srv/ca.crt", func(s *Server) bool { return s.Datastore.CAFile == "/srv/ca.crt" }},
	"datastore-certfile":                {"/srv/a.crt", func(s *Server) bool { return s.Datastore.CertFile == "/srv/a.crt" }},
	"datastore-keyfile":                 {"/srv/a.key", func(s *Server) bool { return s.Datastore.KeyFile == "/srv/a.key" }},
	"server":                            {"https://192.0.2.1", func(s *Server) bool { return s.Server == "https://192.0.2.1:6443" }},
	"token":                             {"K10" + strings.Repeat("0a", 32) + "::abcdef.0123456789abcdef0123456789abcdef", func(s *Server) bool { return s.Token.ID == "abcdef" }},
	"token-ca-hash":                     {strings.Repeat("0b", 32), func(s *Server) bool { return s.Token.CAHash == strings.Repeat("0b", 32) && s.Token.ID == "abcdef" }},
	"cluster-reset":                     {"true", func(s *Server) bool { return s.ClusterReset }},
	"cluster-reset-force":               {"true", func(s *Server) bool { return s.ClusterResetForce }},
	"cluster-reset-restore-path":        {"/srv/a.tar.zst", func(s *Server) bool { return s.ClusterResetRestorePath == "/srv/a.tar.zst" }},
	"etcd-arg":                          {"quota-backend-bytes=4294967296", func(s *Server) bool { return s.EtcdArgs.Quota == 4<<30 }},
}

func s3(shows func(*S3) bool) func(*Server) bool {
	return func(s *Server) bool { return s.Snapshots.S3 != nil && shows(s.Snapshots.S3) }
}

// needed are flags without which the example of a flag has no effect, or is refused.
func needed(flag string) []string {
	switch {
	case flag == "token", flag == "token-file":
		return []string{"--server=https://a"}
	case flag == "token-ca-hash":
		return []string{"--server=https://a", "--token=abcdef.0123456789abcdef0123456789abcdef"}
	case flag == "datastore-cafile":
		return []string{"--datastore-endpoint=etcd://a"}
	case flag == "datastore-certfile":
		return []string{"--datastore-endpoint=etcd://a", "--datastore-keyfile=k"}
	case flag == "datastore-keyfile":
		return []string{"--datastore-endpoint=etcd://a", "--datastore-certfile=c"}
	case flag == "cluster-reset-restore-path", flag == "cluster-reset-force":
		return []string{"--cluster-reset"}
	case flag == "s3-bucket":
		return []string{"--s3"}
	case strings.HasPrefix(flag, "s3-access-key"):
		return []string{"--s3", "--s3-bucket=b-1", "--s3-secret-key=x"}
	case strings.HasPrefix(flag, "s3-secret-key"):
		return []string{"--s3", "--s3-bucket=b-1", "--s3-access-key=x"}
	case flag == "s3":
		return []string{"--s3-bucket=b-1"}
	case strings.HasPrefix(flag, "s3-"):
		return []string{"--s3", "--s3-bucket=b-1"}
	}
	return nil
}

func env(flag, value string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_")) + "=" + value
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestEveryFlagHasEnvironmentAndFileForm(t *testing.T) {
	empty := file(t, "")
	flags := ServerFlags()
	endpoint := file(t, "mysql://u:p@tcp(h)/d\n")
	example := maps.Clone(example)
	example["datastore-endpoint-file"] = struct {
		value string
		shows func(*Server) bool
	}{value: endpoint, shows: func(s *Server) bool { return s.Datastore.Kind == MySQL && s.Datastore.Endpoint == "u:p@tcp(h)/d" }}
	tokenFile := file(t, example["token"].value+"\n")
	example["token-file"] = struct {
		value string
		shows func(*Server) bool
	}{value: tokenFile, shows: example["token"].shows}
	if got, want := slices.Sorted(maps.Keys(example)), flags.keys(); !slices.Equal(got, want) {
		t.Fatalf("examples are for %q, flags are %q", got, want)
	}
	if s, err := Parse([]string{"-c", empty}, nil); err != nil {
		t.Fatal(err)
	} else {
		for name, e := range example {
			// A pool has no default to compare with.
			if name != "loadbalancer-pool" && e.shows(s) {
				t.Errorf("%s: the example is the default", name)
			}
		}
	}
	for name, e := range example {
		for form, parse := range map[string]func() (*Server, error){
			"flag":        func() (*Server, error) { return Parse(append(needed(name), "-c", empty, "--"+name+"="+e.value), nil) },
			"environment": func() (*Server, error) { return Parse(append(needed(name), "-c", empty), []string{env(name, e.value)}) },
			"file":        func() (*Server, error) { return Parse(append(needed(name), "-c", file(t, name+": "+e.value)), nil) },
			"file, quoted": func() (*Server, error) {
				return Parse(append(needed(name), "-c", file(t, name+": '"+e.value+"'")), nil)
			},
			"file by POLYMESH_CONFIG": func() (*Server, error) {
				return Parse(needed(name), []string{env("config", file(t, name+": "+e.value))})
			},
		} {
			s, err := parse()
			if err != nil {
				t.Errorf("%s by %s: %v", name, form, err)
			} else if !e.shows(s) {
				t.Errorf("%s by %s: %s has no effect", name, form, e.value)
			}
		}
	}
}

func TestPrecedence(t *testing.T) {
	path := file(t, "node-name: from-file\ntls-san: [a.file, b.file]\nkubelet-arg:\n- v=1\n- max-pods=50\ncluster-domain: file.local\n")
	s, err := Parse([]string{"-c", path, "--node-name", "from-flag", "--kubelet-arg=v=3"},
		[]string{env("node-name", "from-env"), env("tls-san", "a.env,b.env"), env("cluster-domain", ""), "POLYMESH_BIN=/bin/true", "OTHER=x"})
	if err != nil {
		t.Fatal(err)
	}
	if s.NodeName != "from-flag" || !slices.Equal(s.TLSSANs, []string{"a.env", "b.env"}) ||
		!slices.Equal(s.KubeletArgs, []string{"v=3"}) || s.ClusterDomain != "file.local" {
		t.Errorf("got %q %q %q %q", s.NodeName, s.TLSSANs, s.KubeletArgs, s.ClusterDomain)
	}
}

func TestFileKeepsTextAsWritten(t *testing.T) {
	s, err := Parse([]string{"-c", file(t, `
# modes, names and booleans that YAML would read as something else
write-kubeconfig-mode: 0640
node-name: on
node-label:
  - version=1.10
  - team=yes
tls-san: &names [a.example.com]
https-listen-port: 7443
debug: true
disable: [istio, traefik]
kubelet-arg: max-pods=20
`)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.KubeconfigMode != 0o640 || s.NodeName != "on" || !slices.Equal(s.NodeLabels, []string{"version=1.10", "team=yes"}) ||
		s.HTTPSPort != 7443 || !s.Debug || s.Enabled(Istio) || !slices.Equal(s.KubeletArgs, []string{"max-pods=20"}) {
		t.Errorf("got %+v", s)
	}
	if len(s.Notes) != 1 || !strings.Contains(s.Notes[0], "--disable traefik does nothing: Polymesh has no Traefik") {
		t.Errorf("notes are %q", s.Notes)
	}
}

func TestBadFile(t *testing.T) {
	for content, want := range map[string]string{
		"node-name: a\nno-such: 1":         `line 2: unknown key "no-such"; valid keys: advertise-address, audit-log, `,
		"config: /other":                   `unknown key "config"; valid keys: `,
		"node-name: a\nnode-name: b":       "node-name is set twice",
		"node-name: [a, b]":                "node-name takes one value, not a list of 2",
		"node-name: []":                    "node-name takes one value, not a list of 0",
		"node-name: {a: b}":                "node-name takes a value or a list, not a map",
		"node-name:":                       "node-name has no value",
		"tls-san: [a, [b]]":                "tls-san takes a list of plain values",
		"tls-san: [a, ]\n---\ndebug: true": "a second document",
		"- node-name":                      "not a map of keys",
		"node-name: \"a":                   "not valid YAML",
		"\x00\x01binary":                   "not valid YAML",
		"https-listen-port: many":          `line 1: --https-listen-port "many" is not a whole number`,
		"https-listen-port: 70000":         "--https-listen-port 70000 is not a port: 1 to 65535",
		"debug: perhaps":                   `--debug "perhaps" is not true or false`,
		"tls-san: 'a\"b'":                  "is not a comma-separated list of values",
	} {
		_, err := Parse([]string{"-c", file(t, content)}, nil)
		wantError(t, content, err, want)
	}
	_, err := Parse([]string{"-c", "/no/such/file.yaml"}, nil)
	wantError(t, "a file that is not there", err, "read config file: open /no/such/file.yaml")
}

// wantError also checks that a message has only one line.
func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %q", what, want)
	} else if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%s: error is %q, want one line with %q", what, err, want)
	}
}

func TestBadFlags(t *testing.T) {
	empty := file(t, "")
	for args, want := range map[string]string{
		"--no-such-flag":                                       "unknown flag: --no-such-flag (see `polymesh server --help`)",
		"extra":                                                `unexpected argument "extra"`,
		"--https-listen-port=x":                                `--https-listen-port "x" is not a whole number`,
		"--https-listen-port=0":                                "--https-listen-port 0 is not a port: 1 to 65535",
		"--https-listen-port=10250":                            "--https-listen-port 10250 is the port of the kubelet",
		"--https-listen-port=30001":                            "lies in --service-node-port-range",
		"--data-dir=":                                          "--data-dir: it is empty: specify a folder, or omit the flag for /var/lib/polymesh",
		"--data-dir=/":                                         "--data-dir / is refused",
		"--data-dir=/a:b":                                      `--data-dir "/a:b" is refused`,
		"--data-dir=/a?b":                                      `--data-dir "/a?b" is refused`,
		"--write-kubeconfig=":                                  `--write-kubeconfig "" is not a file name`,
		"--write-kubeconfig-mode=abc":                          `--write-kubeconfig-mode "abc" is not an octal file mode of at least 600, such as 0600 or 0644`,
		"--write-kubeconfig-group=nosuchgroup":                 `--write-kubeconfig-group "nosuchgroup" is not a group of this machine`,
		"--write-kubeconfig-mode=0444":                         `--write-kubeconfig-mode "0444"`,
		"--write-kubeconfig-mode=1777":                         `--write-kubeconfig-mode "1777"`,
		"--node-name=Big_Name":                                 `--node-name "Big_Name" is not a DNS name: lowercase`,
		"--node-name=" + strings.Repeat("a", 254):              "is not a DNS name",
		"--node-ip=host":                                       `--node-ip "host" is not the IP address of a host`,
		"--node-ip=0.0.0.0":                                    `--node-ip "0.0.0.0" is not the IP address of a host`,
		"--node-ip=127.0.0.1":                                  `--node-ip "127.0.0.1" is not the IPv4 address of a host`,
		"--node-ip=fd00::1":                                    `--node-ip "fd00::1" is not the IPv4 address`,
		"--node-ip=::ffff:192.0.2.1":                           "is not the IPv4 address",
		"--advertise-address=::1":                              `--advertise-address "::1" is not the IPv4 address`,
		"--node-external-ip=1.2.3":                             `--node-external-ip "1.2.3"`,
		"--node-label=novalue":                                 `--node-label "novalue" is not key=value`,
		"--node-label=-a=b":                                    `--node-label "-a=b"`,
		"--node-taint=a=b":                                     `--node-taint "a=b" is not key=value:effect with effect one of NoSchedule, PreferNoSchedule, NoExecute`,
		"--node-taint=a=b:Never":                               "effect one of NoSchedule",
		"--bind-address=all":                                   `--bind-address "all" is not an IP address`,
		"--tls-san=a_b":                                        `--tls-san "a_b" is neither a DNS name nor an IP address`,
		"--cluster-cidr=10.42.0.0":                             `--cluster-cidr "10.42.0.0" is not a CIDR such as 10.42.0.0/16`,
		"--cluster-cidr=10.42.0.1/16":                          "is not a CIDR",
		"--cluster-cidr=10.42.0.0/25":                          "the prefix must be from /8 to /24",
		"--cluster-cidr=fd00::/64":                             "only IPv4 is supported",
		"--service-cidr=10.43.0.0/29":                          "the prefix must be from /8 to /28",
		"--service-cidr=10.42.128.0/20":                        "--cluster-cidr 10.42.0.0/16 and --service-cidr 10.42.128.0/20 overlap",
		"--cluster-cidr=127.0.0.0/16":                          "these addresses cannot be",
		"--cluster-cidr=169.254.0.0/16":                        "these addresses cannot be",
		"--service-cidr=224.0.0.0/16":                          "these addresses cannot be",
		"--service-cidr=0.0.0.0/8":                             "these addresses cannot be",
		"--cluster-dns=10.43.0.1":                              "is taken",
		"--cluster-dns=10.43.0.0":                              "is taken",
		"--cluster-dns=10.44.0.10":                             "--cluster-dns 10.44.0.10 is not in --service-cidr 10.43.0.0/16",
		"--cluster-domain=Cluster":                             `--cluster-domain "Cluster" is not a DNS name`,
		"--service-node-port-range=30000":                      "is not a port range such as 30000-32767",
		"--service-node-port-range=2-1":                        "is not a port range",
		"--service-node-port-range=1-70000":                    "is not a port range",
		"--flannel-backend=calico":                             `--flannel-backend "calico" is not one of vxlan, host-gw, wireguard-native, none`,
		"--flannel-backend=wireguard":                          "--flannel-backend wireguard is not supported: use wireguard-native",
		"--flannel-port=-1":                                    "--flannel-port -1 is not a port: 1 to 65535",
		"--flannel-port=30001":                                 "--flannel-port 30001 lies in --service-node-port-range 30000-32767",
		"--flannel-iface=a/b":                                  `--flannel-iface "a/b" is not the name of a network interface`,
		"--flannel-iface=a_name_of_16byte":                     "is not the name of a network interface",
		"--flannel-backend=host-gw --flannel-external-ip=true": "--flannel-external-ip does not work with --flannel-backend host-gw",
		"--disable=nginx":                                      `--disable "nginx" is not one of coredns, metrics-server, local-storage, servicelb, istio`,
		"--secrets-encryption-provider=kms":                    `--secrets-encryption-provider "kms" is not one of secretbox, aescbc`,
		"--pod-security=strict":                                `--pod-security "strict" is not one of privileged, baseline, restricted`,
		"--secrets-encryption --kube-apiserver-arg=encryption-provider-config=/a":       "--secrets-encryption and --kube-apiserver-arg=encryption-provider-config are mutually exclusive",
		"--pod-security=baseline --kube-apiserver-arg=admission-control-config-file=/a": "--pod-security and --kube-apiserver-arg=admission-control-config-file are mutually exclusive",
		"--loadbalancer-pool=x":                                         `--loadbalancer-pool "x": neither an IPv4 CIDR nor a range first-last`,
		"--loadbalancer-pool=192.0.2.9-192.0.2.1":                       "not a range of IPv4 addresses first-last",
		"--loadbalancer-pool=10.42.7.0/24":                              "overlaps the cluster's own addresses 10.42.0.0/16",
		"--loadbalancer-pool=10.0.0.0-11.0.0.0":                         "overlaps the cluster's own addresses",
		"--loadbalancer-pool=0.0.0.0/0":                                 "overlaps the cluster's own addresses",
		"--snapshot-schedule=daily":                                     `--snapshot-schedule "daily" is not a cron expression such as "0 */12 * * *"`,
		"--snapshot-retention=0":                                        "at least one snapshot is kept",
		"--snapshot-dir=/":                                              "--snapshot-dir / is refused",
		"--snapshot-passphrase-file=/nonexistent":                       "--snapshot-passphrase-file: open /nonexistent: no such file",
		"--snapshot-passphrase-file=/dev/null":                          "/dev/null is empty",
		"--s3":                                                          "--s3-bucket is missing",
		"--s3 --s3-bucket=a/b":                                          `--s3-bucket "a/b" is not the name of a bucket`,
		"--s3 --s3-bucket=abc --s3-endpoint=https://a":                  `--s3-endpoint "https://a" is not a host name or host:port, without https://`,
		"--s3 --s3-bucket=abc --s3-folder=a/../b":                       `--s3-folder "a/../b" is not a path`,
		"--s3 --s3-bucket=abc --s3-access-key=a":                        "--s3-access-key and --s3-secret-key belong together",
		"--s3 --s3-bucket=abc --s3-secret-key=a --s3-secret-key-file=b": "are mutually exclusive",
		"--s3 --s3-bucket=abc --s3-timeout=soon":                        `--s3-timeout "soon" is not a time such as 5m`,
		"--s3 --s3-bucket=abc --s3-timeout=0s":                          "--s3-timeout 0s is not a time",
		"--datastore-sync=off":                                          `--datastore-sync "off" is not one of full, normal`,
		"--observe-disk=much":                                           `--observe-disk "much" is not a number of bytes such as 2GiB`,
		"--observe-disk=-1":                                             `--observe-disk "-1" is not a number of bytes`,
		"--observe-disk=99999999Ti":                                     `--observe-disk "99999999Ti" is not a number of bytes`,
		"--observe-disk=1MiB":                                           "--observe-disk 1MiB is less than 64MiB",
		"--observe-memory=plenty":                                       `--observe-memory "plenty" is not a number of bytes such as 512MiB`,
		"--observe-memory=100MiB":                                       "--observe-memory 100MiB is not between 150MB and 1TiB",
		"--observe-retention=week":                                      `--observe-retention "week" is not a time such as 7d or 36h`,
		"--observe-retention=1h":                                        "--observe-retention 1h is not between 1d and 3650d",
		"--observe-retention=99999999999d":                              `--observe-retention "99999999999d" is not a time`,
		"--observe-cluster-access=query":                                `--observe-cluster-access "query" is not one of all, ingest, off`,
		"--mesh-profile=ambient":                                        `--mesh-profile "ambient" is not one of default, demo, minimal, empty`,
		"--kubelet-arg==x":                                              `--kubelet-arg "=x" is not name=value`,
		"--kube-proxy-arg=-v=1":                                         `--kube-proxy-arg "-v=1" is not name=value`,
		"--v=11":                                                        "--v 11 is not a verbosity from 0 to 10",
		"--debug=perhaps":                                               `--debug "perhaps" is not true or false`,
		"--loadbalancer-pool=192.0.2.0/28 --disable=servicelb":          "--loadbalancer-pool needs servicelb",
	} {
		_, err := Parse(append([]string{"-c", empty}, strings.Fields(args)...), nil)
		wantError(t, args, err, want)
	}
	_, err := Parse([]string{"-c", empty}, []string{env("v", "high")})
	wantError(t, "POLYMESH_V", err, `environment variable POLYMESH_V: --v "high" is not a whole number`)
	if _, err := Parse([]string{"--help"}, nil); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

// The spellings are K3s's (https://docs.k3s.io/cli/server), so that a K3s command line works.
func TestK3sCommandLine(t *testing.T) {
	s, err := Parse(strings.Fields(`-c `+file(t, "")+` -d /srv/k -o /srv/k.yaml -i 192.0.2.4 -v 1 --disable traefik,servicelb
		--disable helm-controller --tls-san a.example.com,192.0.2.9 --tls-san *.example.com --node-label a=b,c=d
		--node-taint k=v:NoSchedule --node-taint solo:NoExecute --kubelet-arg eviction-hard=memory.available<5%,nodefs.available<1%
		--kubelet-arg --max-pods=20 --write-kubeconfig-mode 644 --etcd-snapshot-retention 7 --etcd-snapshot-dir=/srv/snap --etcd-s3
		--etcd-s3-bucket=backups --etcd-s3-folder a`), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.DataDir != "/srv/k" || s.LogLevel != 1 || s.KubeconfigMode != 0o644 || len(s.Notes) != 2 || s.Enabled(ServiceLB) ||
		s.Snapshots.Retention != 7 || s.Snapshots.Dir != "/srv/snap" || s.Snapshots.S3 == nil || s.Snapshots.S3.Bucket != "backups" || s.Snapshots.S3.Folder != "a" ||
		!slices.Equal(s.TLSSANs, []string{"a.example.com", "192.0.2.9", "*.example.com"}) ||
		!slices.Equal(s.NodeLabels, []string{"a=b", "c=d"}) || !slices.Equal(s.NodeTaints, []string{"k=v:NoSchedule", "solo:NoExecute"}) ||
		!slices.Equal(s.KubeletArgs, []string{"eviction-hard=memory.available<5%,nodefs.available<1%", "--max-pods=20"}) {
		t.Errorf("got %+v", s)
	}
}

func TestAddressRange(t *testing.T) {
	for text, want := range map[string][2]string{
		"192.0.2.0/24":               {"192.0.2.1", "192.0.2.254"},
		"192.0.2.8/30":               {"192.0.2.9", "192.0.2.10"},
		"192.0.2.8/31":               {"192.0.2.8", "192.0.2.9"},
		"192.0.2.8/32":               {"192.0.2.8", "192.0.2.8"},
		"192.0.2.3-192.0.2.3":        {"192.0.2.3", "192.0.2.3"},
		"192.0.2.250 - 192.0.3.5":    {"192.0.2.250", "192.0.3.5"},
		"255.255.255.0/24":           {"255.255.255.1", "255.255.255.254"},
		"0.0.0.0/0":                  {"0.0.0.1", "255.255.255.254"},
		"198.51.100.0-198.51.100.17": {"198.51.100.0", "198.51.100.17"},
	} {
		r, err := addressRange(text)
		if err != nil || r.From.String() != want[0] || r.To.String() != want[1] {
			t.Errorf("%s is %s-%s (%v), want %s-%s", text, r.From, r.To, err, want[0], want[1])
		}
		if err == nil && (!r.Contains(r.From) || !r.Contains(r.To) || r.Contains(r.To.Next()) || r.Contains(r.From.Prev())) {
			t.Errorf("%s: Contains is wrong at an end", text)
		}
	}
}

// All spellings of a path give the same data dir, or else commands would look for the server in another place.
func TestDataDir(t *testing.T) {
	here := t.TempDir()
	t.Chdir(here)
	for text, want := range map[string]string{
		"/srv/p": "/srv/p", "/srv/p/": "/srv/p", "/srv//p/.": "/srv/p", "/srv/x/../p": "/srv/p", "/var/lib/polymesh/": string(layout.DefaultDataDir),
		"data": filepath.Join(here, "data"), "./data/": filepath.Join(here, "data"), "..": filepath.Dir(here), ".": here,
	} {
		if got, err := layout.ParseDataDir(text); err != nil || string(got) != want {
			t.Errorf("%q is %q, %v, want %q", text, got, err, want)
		}
		server, err := Parse([]string{"-c", file(t, ""), "-d", text}, nil)
		if err != nil || string(server.DataDir) != want {
			t.Errorf("the server's own: %q: %v, want %q", text, err, want)
		}
	}
	// A link is a different name: the server does not resolve it either.
	if err := os.Symlink(here, filepath.Join(here, "link")); err != nil {
		t.Fatal(err)
	}
	if got, err := layout.ParseDataDir("link/"); err != nil || string(got) != filepath.Join(here, "link") {
		t.Errorf("a link is %q, %v", got, err)
	}
	_, err := layout.ParseDataDir("")
	wantError(t, "an empty name", err, "it is empty: specify a folder, or omit the flag for /var/lib/polymesh")
}

func FuzzFile(f *testing.F) {
	for _, seed := range []string{"", "debug: true", "a: [b, c]", "? x\n: y", "<<: {a: b}", "a: &x b\nc: *x", "--- 1\n...", "[a]: b", "\ttab: 1", "!!null"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, content string) {
		// For any contents of the file, the result is a configuration or a one-line error.
		if _, err := Parse([]string{"-c", file(t, content)}, nil); err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("more than one line: %q", err)
		}
	})
}

// An agent has the settings of a node, from the same places as a server's, and defines how it joins.
func TestAgent(t *testing.T) {
	valid, err := token.New(strings.Repeat("0a", 32), token.Agent)
	if err != nil {
		t.Fatal(err)
	}
	tokenFile, text := filepath.Join(t.TempDir(), "token"), valid.String()
	if err := os.WriteFile(tokenFile, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	parse := func(environ []string, config string, args ...string) (*Agent, error) {
		f := AgentFlags()
		if err := f.Parse(append([]string{"-c", file(t, config)}, args...)); err != nil {
			return nil, err
		}
		return f.Agent(environ)
	}
	a, err := parse([]string{"POLYMESH_NODE_NAME=worker"}, "node-label: [zone=a, rack=1]", "-s", "https://192.0.2.1", "--token-file", tokenFile, "--kubelet-arg", "max-pods=50")
	if err != nil {
		t.Fatal(err)
	}
	if a.Server != "https://192.0.2.1:6443" || a.Token != valid || a.NodeName != "worker" || !slices.Equal(a.NodeLabels, []string{"zone=a", "rack=1"}) || !slices.Equal(a.KubeletArgs, []string{"max-pods=50"}) {
		t.Errorf("%+v", a)
	}
	if a, err := parse(nil, "", "--server", "https://a", "--token", valid.Bearer(), "--token-ca-hash", "sha256:"+valid.CAHash); err != nil || a.Token != valid {
		t.Errorf("a token with its hash beside it: %+v, %v", a, err)
	}
	if a, err := parse([]string{"POLYMESH_TOKEN=" + text, "POLYMESH_URL=https://[2001:db8::1]:443/"}, ""); err != nil || a.Server != "https://[2001:db8::1]:443" || a.Token != valid {
		t.Errorf("%+v, %v", a, err)
	}
	for what, c := range map[string]struct {
		args []string
		want string
	}{
		"no server":         {[]string{"--token", text}, "--server is missing"},
		"two tokens":        {[]string{"--server", "https://a", "--token", text, "--token-file", tokenFile}, "are mutually exclusive"},
		"plain HTTP":        {[]string{"--server", "http://a:6443", "--token", text}, "is not the URL of a server"},
		"a path":            {[]string{"--server", "https://a/b", "--token", text}, "is not the URL of a server"},
		"credentials":       {[]string{"--server", "https://u:p@a", "--token", text}, "is not the URL of a server"},
		"a port too high":   {[]string{"--server", "https://a:65536", "--token", text}, "is not a port"},
		"a missing file":    {[]string{"--server", "https://a", "--token-file", tokenFile + "x"}, "no such file"},
		"a server's flag":   {[]string{"--cluster-cidr", "10.0.0.0/16"}, "unknown flag: --cluster-cidr"},
		"a bad node's name": {[]string{"--server", "https://a", "--token", text, "--node-name", "A_B"}, "--node-name"},
		"a secret alone":    {[]string{"--server", "https://a", "--token", "chosen-by-the-user-0123456789"}, "it is a secret alone, without the hash"},
		"a wrong hash":      {[]string{"--server", "https://a", "--token", valid.Bearer(), "--token-ca-hash", "0a"}, "is not the hash of an authority"},
		"two hashes":        {[]string{"--server", "https://a", "--token", text, "--token-ca-hash", valid.CAHash}, "remove --token-ca-hash"},
		"only a hash":       {[]string{"--server", "https://a", "--token-ca-hash", valid.CAHash}, "--token-ca-hash is for a token without a hash"},
		"no whole token":    {[]string{"--server", "https://a", "--token", valid.Bearer()}, "--token: the token lacks the hash"},
		"no token":          {[]string{"--server", "https://a", "--token", "x"}, "on a server, `cat /var/lib/polymesh/server/node-token` or `polymesh token create` print the whole token, or give --token-ca-hash, too"},
		"an argument":       {[]string{"https://a"}, "`polymesh agent` takes flags only"},
	} {
		_, err := parse(nil, "", c.args...)
		wantError(t, what, err, c.want)
	}
	if _, err := parse(nil, "cluster-cidr: 10.0.0.0/16"); err == nil || !strings.Contains(err.Error(), `unknown key "cluster-cidr"`) {
		t.Errorf("a server's key: %v", err)
	}
}

// A server joins others with a server's token, and takes the cluster's settings.
func TestServerJoins(t *testing.T) {
	agents, err := token.New(strings.Repeat("0a", 32), token.Agent)
	if err != nil {
		t.Fatal(err)
	}
	valid, err := token.New(strings.Repeat("0a", 32), token.Server)
	if err != nil {
		t.Fatal(err)
	}
	parse := func(args ...string) (*Server, error) { return Parse(append([]string{"-c", file(t, "")}, args...), nil) }
	s, err := parse("--server", "https://192.0.2.1", "--token", valid.String())
	if err != nil || s.Server != "https://192.0.2.1:6443" || s.Token != valid {
		t.Fatalf("%+v, %v", s, err)
	}
	const chosen = "chosen-by-the-user-0123456789"
	for _, args := range [][]string{{"--cluster-init", "--token", chosen}, {"--datastore-endpoint", "etcd://a", "--token", chosen}} {
		if s, err := parse(args...); err != nil || s.Secret != chosen || s.Token != (token.Token{}) {
			t.Errorf("%q: %+v, %v", args, s, err)
		}
	}
	if s, err := parse("--server", "https://a", "--token", chosen, "--token-ca-hash", valid.CAHash); err != nil || s.Secret != "" || s.Token.CAHash != valid.CAHash || s.Token.Role() != token.Server {
		t.Errorf("%+v, %v", s, err)
	}
	for want, args := range map[string][]string{
		"is too weak, and opens the cluster's authorities":              {"--cluster-init", "--token", "12345"},
		"it is a secret alone, without the hash":                        {"--server", "https://a", "--token", chosen},
		"/server/token` or `polymesh token create --role server` print": {"--server", "https://a", "--token", "x"},
		"SQLite is for one server":                                      {"--token", chosen},
		"--server joins a cluster, and --cluster-init begins one":       {"--server", "https://192.0.2.1", "--cluster-init"},
		"give --server, too":                                            {"--token", valid.String()},
		"the token is one for agents":                                   {"--server", "https://192.0.2.1", "--token", agents.String()},
		"--datastore-sync is for SQLite, which only one server can use": {"--server", "https://192.0.2.1", "--datastore-sync", "normal"},
		"is not the URL of a server":                                    {"--server", "192.0.2.1"},
	} {
		_, err := parse(args...)
		wantError(t, strings.Join(args[:1], " "), err, want)
	}
	first, err := parse("--cluster-init", "--disable", "istio,servicelb", "--cluster-cidr", "10.50.0.0/16", "--pod-security", "baseline")
	if err != nil {
		t.Fatal(err)
	}
	same, err := parse("--server", "https://192.0.2.1", "--disable", "servicelb", "--disable", "istio", "--node-label", "a=b")
	if err != nil {
		t.Fatal(err)
	}
	adopted, err := same.Adopt(first.Settings())
	if err != nil {
		t.Fatal(err)
	}
	if adopted.ClusterCIDR != first.ClusterCIDR || adopted.PodSecurity != "baseline" || adopted.Enabled(Istio) || !adopted.Enabled(CoreDNS) || !slices.Equal(adopted.NodeLabels, []string{"a=b"}) || adopted.Server != same.Server {
		t.Errorf("%+v", adopted)
	}
	if !slices.Contains(adopted.ClusterFlags, "cluster-cidr=10.50.0.0/16") {
		t.Errorf("the cluster's flags are %q", adopted.ClusterFlags)
	}
	other, err := parse("--server", "https://192.0.2.1", "--cluster-cidr", "10.60.0.0/16", "--disable", "coredns", "--pod-security", "baseline")
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.Adopt(first.Settings())
	wantError(t, "other settings", err, "here --cluster-cidr=10.60.0.0/16, in the cluster --cluster-cidr=10.50.0.0/16; here --disable=coredns, in the cluster --disable=istio --disable=servicelb")
	if other, err = parse("--cluster-init", "--cluster-cidr", "10.60.0.0/16", "--disable", "coredns"); err != nil {
		t.Fatal(err)
	}
	replaced, err := other.Replace(first.Settings())
	if err != nil {
		t.Fatal(err)
	}
	if replaced.ClusterCIDR.String() != "10.60.0.0/16" || replaced.PodSecurity != "baseline" || replaced.Enabled(CoreDNS) || !replaced.Enabled(Istio) {
		t.Errorf("%+v", replaced.Cluster)
	}
	// Files have other names on other servers: the keys in them are compared, and come from the cluster.
	mine, copied, another := publicKeyFile(t), filepath.Join(t.TempDir(), "same.pub"), publicKeyFile(t)
	text, err := os.ReadFile(mine)
	if err == nil {
		err = os.WriteFile(copied, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if first, err = parse("--cluster-init", "--image-policy-key", mine); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"--image-policy-key", copied}, {"--image-policy-key", copied, "--image-policy-key", mine}} {
		same, err := parse(append([]string{"--server", "https://192.0.2.1"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		adopted, err := same.Adopt(first.Settings())
		if err != nil || !reflect.DeepEqual(adopted.ImagePolicyKeys, first.ImagePolicyKeys) || !slices.Equal(adopted.Settings(), first.Settings()) {
			t.Errorf("with %q: %v, %v", args, adopted, err)
		}
	}
	// The version before shared the names of files, which may be the same on all servers, or not.
	for _, shared := range []string{copied, mine, filepath.Join(t.TempDir(), "only-on-the-first.pub")} {
		same, err := parse("--server", "https://192.0.2.1", "--image-policy-key", copied)
		if err != nil {
			t.Fatal(err)
		}
		if adopted, err := same.Adopt([]string{"image-policy-key=" + shared}); err != nil || !reflect.DeepEqual(adopted.ImagePolicyKeys, first.ImagePolicyKeys) {
			t.Errorf("the cluster has %s: %v, %v", shared, adopted, err)
		}
	}
	// A snapshot has the key, and not the name of a file that another machine does not have.
	if len(first.ClusterFlags) != 1 || !strings.HasPrefix(first.ClusterFlags[0], "image-policy-key=base64:") {
		t.Errorf("the cluster's flags are %q", first.ClusterFlags)
	}
	if again, err := parse("--" + first.ClusterFlags[0]); err != nil || !reflect.DeepEqual(again.ImagePolicyKeys, first.ImagePolicyKeys) {
		t.Errorf("with %q: %v, %v", first.ClusterFlags, again, err)
	}
	if other, err = parse("--server", "https://192.0.2.1", "--image-policy-key", another); err != nil {
		t.Fatal(err)
	}
	_, err = other.Adopt(first.Settings())
	wantError(t, "another key", err, "here --image-policy-key="+another+" (sha256:")
	wantError(t, "another key", err, ", in the cluster --image-policy-key=sha256:")
	without, err := parse("--cluster-init")
	if err != nil {
		t.Fatal(err)
	}
	_, err = other.Adopt(without.Settings())
	wantError(t, "a key where the cluster has none", err, ", in the cluster --image-policy-key=")
	_, err = same.Adopt([]string{"new-setting=1"})
	wantError(t, "a setting of a newer version", err, "which this version does not know")
	_, err = same.Adopt([]string{"cluster-cidr=10.50.0.0/99"})
	wantError(t, "a damaged setting", err, "--cluster-cidr")
	if same, err = parse("--server", "https://192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	_, err = same.Adopt([]string{"image-policy-key=base64:AAAA"})
	wantError(t, "a damaged key", err, "--image-policy-key")
}
