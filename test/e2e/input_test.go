//go:build e2e

package e2e

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"polymesh.dev/polymesh/test/e2e/node"
)

// badInput is one way in which a server cannot start.
type badInput struct {
	name string
	args []string
	env  []string
	// mounts is a shell script that changes the machine as this server alone sees it, in a separate mount namespace.
	// $DIR is the node's folder, $DATA the data dir.
	mounts string
	// as runs it as another user.
	as []string
	// want is part of the line that it prints.
	want string
}

// A server that cannot start reports why in one line, and creates nothing.
func TestBadInput(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{})
	config := func(name, text string) string {
		path := filepath.Join(n.Dir, name+".yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fake := func(name, text string) string {
		path := filepath.Join(n.Dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	nobody := []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}
	if err := os.Mkdir(filepath.Join(n.Dir, "small"), 0o700); err != nil {
		t.Fatal(err)
	}
	cases := []badInput{
		{name: "wrong flag", args: []string{"--no-such-flag"}, want: "unknown flag: --no-such-flag"},
		{name: "argument", args: []string{"start"}, want: `unexpected argument "start"`},
		{name: "bad value", args: []string{"--https-listen-port", "70000"}, want: "--https-listen-port 70000 is not a port"},
		{name: "bad taint", args: []string{"--node-taint", "a=b:Never"}, want: "effect one of NoSchedule, PreferNoSchedule, NoExecute"},
		{name: "disable what is not there", args: []string{"--disable", "foo"}, want: `--disable "foo" is not one of coredns, metrics-server, local-storage, servicelb, istio`},
		{name: "profile", args: []string{"--mesh-profile", "huge"}, want: `--mesh-profile "huge" is not one of default, demo, minimal, empty`},
		{name: "environment", env: []string{"POLYMESH_DEBUG=perhaps"}, want: `POLYMESH_DEBUG: --debug "perhaps" is not true or false`},
		{name: "address of another machine", args: []string{"--node-ip", "192.0.2.1"}, want: "--node-ip 192.0.2.1 is not an address of this machine"},

		{name: "no config file", args: []string{"--config", filepath.Join(n.Dir, "none.yaml")}, want: "read config file: open " + n.Dir + "/none.yaml: no such file"},
		{name: "unknown key", args: []string{"--config", config("key", "debug: true\ntls-sans: [a]\n")}, want: `key.yaml, line 2: unknown key "tls-sans"; valid keys: advertise-address, audit-log`},
		{name: "bad value in a file", args: []string{"--config", config("value", "https-listen-port: [1, 2]\n")}, want: "value.yaml, line 1: https-listen-port takes one value"},
		{name: "corrupt config file", args: []string{"--config", config("corrupt", "\x7fELF\x02\x01\x00\x00{{[")}, want: "corrupt.yaml is not valid YAML"},
		{name: "half a config file", args: []string{"--config", config("half", "tls-san:\n- \"a.example")}, want: "half.yaml is not valid YAML"},
		{name: "folder as config file", args: []string{"--config", n.Dir}, want: "is a directory"},

		{name: "data dir on a read-only disk", mounts: `mount --rbind "$DIR" "$DIR" && mount -o remount,bind,ro "$DIR"`, want: n.Dir + " is not writable (read-only file system)"},
		{name: "data dir on a full disk", args: []string{"--data-dir", filepath.Join(n.Dir, "small")},
			mounts: `mount -t tmpfs -o size=20m,mode=700 small "$DIR/small"`, want: "MB are needed: free some, or choose another with --data-dir"},
		{name: "data dir in a file", args: []string{"--data-dir", fake("file", "") + "/data"}, want: "file is not a folder"},
		{name: "kubeconfig on a read-only disk", args: []string{"--write-kubeconfig", filepath.Join(n.Dir, "small", "k.yaml")},
			mounts: `mount -t tmpfs -o ro small "$DIR/small"`, want: "small is not writable (read-only file system)"},

		{name: "no root", as: nobody, want: "a node needs root"},
		{name: "no overlay file system", mounts: `mount --bind "` + fake("filesystems", "nodev\tproc\nnodev\ttmpfs\n\text4\n") + `" /proc/filesystems`,
			want: "the kernel has no overlayfs"},
		{name: "no bridge netfilter", mounts: `mount -t tmpfs none /proc/sys/net/bridge`, want: "the kernel has no bridge netfilter"},
		{name: "no memory cgroup", mounts: withoutMemoryCgroup(t, n), want: `the cgroup controller "memory" is not there`},
	}
	nft := shippedNFT(t)
	for _, c := range cases {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) { startFails(t, n, nft, c) })
	}

	for address, what := range map[string]string{"0.0.0.0:6443": "port 6443, on which the API server listens", "127.0.0.1:10250": "port 10250, on which the kubelet listens"} {
		t.Run("port_in_use_"+address, func(t *testing.T) {
			listener, err := n.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			startFails(t, n, nft, badInput{want: what + ", is in use"})
		})
	}
	t.Run("half_a_program", func(t *testing.T) { halfAProgram(t, n, nft) })
}

// withoutMemoryCgroup hides the memory controller, in either version of cgroups.
func withoutMemoryCgroup(t *testing.T, n *node.Node) string {
	t.Helper()
	for _, list := range []string{"/sys/fs/cgroup/cgroup.controllers", "/proc/cgroups"} {
		text, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		var without strings.Builder
		for line := range strings.Lines(string(text)) {
			if !strings.HasPrefix(line, "memory\t") {
				without.WriteString(strings.ReplaceAll(line, " memory", ""))
			}
		}
		path := filepath.Join(n.Dir, "cgroups")
		if err := os.WriteFile(path, []byte(without.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return `mount --bind "` + path + `" ` + list
	}
	t.Fatal("this machine has no cgroups")
	return ""
}

// startFails starts a server with the bad input, and compares the machine after it with before.
func startFails(t *testing.T, n *node.Node, nft string, bad badInput) {
	t.Helper()
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	before := look(t, n, nft)
	// The program may lie where another user cannot read it. A later flag wins over an earlier one.
	link := filepath.Join(n.Dir, "program")
	script := `touch "$DIR/program" && mount --bind "$PROGRAM" "$DIR/program"`
	if bad.mounts != "" {
		script += " && " + bad.mounts
	}
	script += ` && exec "$@"`
	args := slices.Concat([]string{"--mount", "--propagation", "slave", "--", "sh", "-c", script, "sh"}, bad.as,
		[]string{link, "server", "--data-dir", n.DataDir(), "--write-kubeconfig", n.Kubeconfig()}, bad.args)
	cmd := n.Command(t.Context(), "unshare", args...)
	cmd.Env = append(cmd.Env, "DIR="+n.Dir, "PROGRAM="+program)
	cmd.Env = append(cmd.Env, bad.env...)
	stdout, stderr := outputs(t, cmd, 1)
	wantLine(t, stderr, bad.want)
	if stdout != "" {
		t.Errorf("on standard output is %q", stdout)
	}
	if err := os.Remove(link); err != nil {
		t.Error(err)
	}
	if made := before.differences(look(t, n, nft)); made != "" {
		t.Errorf("a server that did not start has left\n%s", made)
	}
}

// halfAProgram is a copy that is incomplete.
func halfAProgram(t *testing.T, n *node.Node, nft string) {
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	path := filepath.Join(t.TempDir(), "polymesh")
	half, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(half, whole, 50<<20); err != nil {
		t.Fatal(err)
	}
	if err := half.Close(); err != nil {
		t.Fatal(err)
	}
	before := look(t, n, nft)
	_, stderr := outputs(t, n.Command(t.Context(), path, "server", "--data-dir", n.DataDir(), "--write-kubeconfig", n.Kubeconfig()), 1)
	wantLine(t, stderr, "carries no payload")
	if made := before.differences(look(t, n, nft)); made != "" {
		t.Errorf("half a program has left\n%s", made)
	}
}

// secondServerIsRefused tries another server on the data dir of one that runs.
func secondServerIsRefused(t *testing.T, n *node.Node) {
	t.Helper()
	pid := n.PID()
	_, stderr := outputs(t, n.PolymeshCommand(t.Context(), "server", "--data-dir", n.DataDir(), "--write-kubeconfig", filepath.Join(n.Dir, "second.yaml"), "--https-listen-port", "7443"), 1)
	wantLine(t, stderr, "a node is already running on "+n.DataDir())
	if _, err := os.Stat(filepath.Join(n.Dir, "second.yaml")); err == nil {
		t.Error("the second server has written its kubeconfig")
	}
	if n.PID() != pid {
		t.Error("the first server has ended")
	}
	if err := apiReady(n); err != nil {
		t.Errorf("the first server after the second one was refused: %v", err)
	}
}
