package layout

import (
	"strings"
	"testing"
)

// Two data dirs never share a folder outside themselves, and the default one uses Kubernetes' usual places.
func TestPathsOfDataDirs(t *testing.T) {
	def := DefaultDataDir
	for got, want := range map[string]string{
		def.Run(): "/run/polymesh", def.CgroupRoot(): "/polymesh", def.Kubelet(): "/var/lib/kubelet",
		def.PodLogs(): "/var/log/pods", def.ContainerdSocket(): "/run/polymesh/containerd/containerd.sock",
		def.StatusSocket(): "/run/polymesh/status.sock", def.Server("tls", "a"): "/var/lib/polymesh/server/tls/a",
		def.Agent(): "/var/lib/polymesh/agent",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	seen := map[string]DataDir{}
	for _, dir := range []DataDir{DefaultDataDir, "/a", "/b", "/a/b", DataDir(strings.Repeat("/long", 60))} {
		for _, path := range []string{dir.Run(), dir.CgroupRoot(), dir.Kubelet(), dir.PodLogs()} {
			if other, ok := seen[path]; ok {
				t.Errorf("%s and %s share %s", dir, other, path)
			}
			seen[path] = dir
		}
		// sun_path of a socket address holds 108 bytes (unix(7)).
		if path := dir.ContainerdSocket() + ".ttrpc"; len(path) >= 108 {
			t.Errorf("%s is too long for a socket", path)
		}
	}
}

// No two parts share a port, and each port has its component.
func TestPorts(t *testing.T) {
	seen := map[int]string{APIServerPort: "kube-apiserver"}
	for _, p := range Ports() {
		if other, ok := seen[p.Number]; ok {
			t.Errorf("%s and %s share port %d", p.What, other, p.Number)
		}
		seen[p.Number] = p.What
		if p.Component == "" || p.What == "" {
			t.Errorf("port %d: %+v", p.Number, p)
		}
	}
}
