//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/test/e2e/node"
)

// machine is everything that a server could leave behind, by kind, as lines.
type machine map[string][]string

// look takes a machine down. Other nodes are omitted, because tests may run in parallel.
func look(t *testing.T, n *node.Node, nft string) machine {
	t.Helper()
	m := machine{
		"processes": processes(t, n),
		"mounts":    mounts(t, n),
		"cgroups":   cgroupDirs(t, n),
		"files":     files(t, n),
	}
	for kind, command := range map[string][]string{
		"interfaces":          {"ip", "-brief", "link", "show"},
		"addresses":           {"ip", "-4", "-brief", "address", "show"},
		"routes":              {"ip", "-4", "route", "show", "table", "all"},
		"routing rules":       {"ip", "rule", "show"},
		"packet filter rules": {nft, "--stateless", "list", "ruleset"},
	} {
		out, err := n.Command(t.Context(), command[0], command[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
		}
		for line := range strings.Lines(string(out)) {
			m[kind] = append(m[kind], strings.TrimRight(line, " \n"))
		}
	}
	return m
}

// differences reports what is in one and not in the other.
func (m machine) differences(now machine) string {
	var out strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(m)) {
		for _, line := range now[kind] {
			if !slices.Contains(m[kind], line) {
				fmt.Fprintf(&out, "%s: + %s\n", kind, line)
			}
		}
		for _, line := range m[kind] {
			if !slices.Contains(now[kind], line) && !sharedFolders.MatchString(line) {
				fmt.Fprintf(&out, "%s: - %s\n", kind, line)
			}
		}
	}
	for kind := range now {
		if _, ok := m[kind]; !ok {
			fmt.Fprintf(&out, "%s:\n%s\n", kind, strings.Join(now[kind], "\n"))
		}
	}
	return out.String()
}

// marks are what names of this node's things hold: its own name, and the name of its run directory.
func marks(n *node.Node) []string {
	return []string{n.Name, filepath.Base(n.Layout().Run())}
}

// anyMark also matches the folders of a data dir that is not a test's.
var anyMark = regexp.MustCompile(`pm-e2e-[0-9a-f]{6}|polymesh-[0-9a-f]{8}|/agent/(kubelet|pods-log|containerd)/`)

// sharedFolders have fixed paths, the same for all nodes of a machine; the last one removes them.
var sharedFolders = regexp.MustCompile(`^(/var/lib/kubelet(/device-plugins.*)?|/var/lib/cni(/results)?|/var/log/containers)$`)

// isAlone reports whether no other server has run on this machine since its last start.
func isAlone(t *testing.T, n *node.Node) bool {
	t.Helper()
	all, err := filepath.Glob("/run/polymesh*")
	if err != nil {
		t.Fatal(err)
	}
	return !slices.ContainsFunc(all, func(dir string) bool { return dir != n.Layout().Run() })
}

func isOwn(n *node.Node, text string) bool {
	return slices.ContainsFunc(marks(n), func(mark string) bool { return strings.Contains(text, mark) })
}

// defaultPlaces are those of a server with the default data dir, which no test has.
var defaultPlaces = regexp.MustCompile(`(^|/)polymesh(/|$)|^/var/lib/kubelet/|^/var/log/(pods|containers)/`)

// imageBuild is what buildah has while it builds an image: where containers/storage mounts one, and what the two keep in the
// machine's folders. No node has any of it.
var imageBuild = regexp.MustCompile(`/overlay/[0-9a-f]{64}/merged$|/storage/overlay|^/var/tmp/(buildah|storage|container_images)|^/(run|var/lib)/(buildah|containers)(/|$)`)

// isForeign reports whether a name belongs to another node, or to an image that is being built.
func isForeign(n *node.Node, name string) bool {
	if _, err := os.Stat("/run/polymesh"); err == nil && defaultPlaces.MatchString(name) {
		return true
	}
	return !isOwn(n, name) && (anyMark.MatchString(name) || imageBuild.MatchString(name))
}

// processes lists those that have anything to do with the node: its files, its cgroups, its network, its name in their
// command line or environment.
func processes(t *testing.T, n *node.Node) (found []string) {
	t.Helper()
	network, err := os.Stat(filepath.Join("/run/netns", n.Name))
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids(t) {
		if pid == os.Getpid() {
			continue
		}
		dir := fmt.Sprintf("/proc/%d", pid)
		own := false
		for _, link := range []string{"exe", "cwd", "root"} {
			target, err := os.Readlink(filepath.Join(dir, link))
			own = own || err == nil && isOwn(n, target)
		}
		for _, file := range []string{"cmdline", "environ", "cgroup"} {
			text, err := os.ReadFile(filepath.Join(dir, file))
			own = own || err == nil && isOwn(n, string(text))
		}
		if ns, err := os.Stat(filepath.Join(dir, "ns", "net")); err == nil {
			own = own || os.SameFile(ns, network)
		}
		if own {
			line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
			if err != nil || len(line) == 0 {
				continue // it has just ended
			}
			found = append(found, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	return found
}

func mounts(t *testing.T, n *node.Node) (found []string) {
	t.Helper()
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if line := fmt.Sprintf("%s on %s type %s", m.Source, m.Mountpoint, m.FSType); !isForeign(n, m.Mountpoint) {
			found = append(found, line)
		}
	}
	return found
}

// cgroupDirs lists the cgroups below each hierarchy's root, and deeper ones that bear the node's name.
func cgroupDirs(t *testing.T, n *node.Node) (found []string) {
	t.Helper()
	const root = "/sys/fs/cgroup"
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		inner, _ := filepath.Rel(root, path)
		if d.IsDir() && !isForeign(n, inner) && (strings.Count(inner, "/") < 2 || isOwn(n, inner)) {
			found = append(found, inner)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// files lists the names where a node's parts keep things by default, and all of the node's own folder.
func files(t *testing.T, n *node.Node) (found []string) {
	t.Helper()
	for _, dir := range []string{"/run", "/var/lib", "/var/log", "/etc", "/opt", "/var/tmp"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	for _, dir := range []string{
		n.Dir, "/etc/cni", "/etc/containerd", "/etc/polymesh", "/opt/cni", "/opt/containerd", "/run/containerd", "/run/netns", "/run/polymesh", "/run/cni",
		"/var/lib/cni", "/var/lib/containerd", "/var/lib/kubelet", "/var/lib/polymesh", "/var/log/containers", "/var/log/pods",
	} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch inner, _ := filepath.Rel(n.Dir, path); {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			// What the harness and the commands that it calls keep for themselves.
			case inner == "cache" || inner == "kubecache":
				return fs.SkipDir
			case inner == filepath.Base(n.Log()):
				return nil
			}
			// A link belongs to whom it leads to.
			if target, err := os.Readlink(path); err == nil && isForeign(n, target) {
				return nil
			}
			if err == nil {
				found = append(found, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	alone := isAlone(t, n)
	found = slices.DeleteFunc(found, func(path string) bool { return isForeign(n, path) || !alone && sharedFolders.MatchString(path) })
	slices.Sort(found)
	return slices.Compact(found)
}

// shippedNFT unpacks nft with its libraries, so that it is there before the first start and after a reset.
func shippedNFT(t *testing.T) string {
	t.Helper()
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	p, err := payload.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	dir := payload.Dir(t.TempDir())
	var names []string
	for name := range p.Files {
		if name == "bin/nft" || strings.HasPrefix(name, "bin/lib/") {
			names = append(names, name)
		}
	}
	if err := p.Unpack(dir, names); err != nil {
		t.Fatal(err)
	}
	return dir.Bin("nft")
}

// resetLeavesNothing resets a node, twice, and compares the machine with what it was before the first start.
func resetLeavesNothing(t *testing.T, n *node.Node, nft string, before machine) {
	t.Helper()
	// So that the comparison is seen to see something.
	full := before.differences(look(t, n, nft))
	for _, want := range []string{
		"processes: + ", "containerd-shim-runc-v2", "mounts: + ", "interfaces: + cni0", "kube-proxy", "cgroups: + ", "files: + " + n.DataDir(),
		"files: + " + n.Layout().Run(), "files: + " + n.Kubeconfig(),
	} {
		if !strings.Contains(full, want) {
			t.Errorf("before reset, the comparison finds no %q", want)
		}
	}
	for _, what := range []string{"reset", "a second reset"} {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		out, err := n.Reset(ctx)
		cancel()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if left := before.differences(look(t, n, nft)); left != "" {
			t.Errorf("after %s, which printed\n%s\nthe machine differs from what it was:\n%s", what, out, left)
		}
	}
}

const volumeManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-reset}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: files, namespace: e2e-reset}
data: {file: text}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: e2e-reset}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: volumes, namespace: e2e-reset}
spec:
  containers:
  - name: echo
    image: "` + echoImage + `"
    ports: [{containerPort: 8080, hostPort: 8088}]
    volumeMounts:
    - {name: data, mountPath: /data}
    - {name: memory, mountPath: /memory}
    - {name: files, mountPath: /file, subPath: file}
  volumes:
  - {name: data, persistentVolumeClaim: {claimName: data}}
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: files, configMap: {name: files}}
`

// A reset under a running server with pods and volumes leaves the machine as it was, and what is not Polymesh's alone.
func TestReset(t *testing.T) {
	ownNodes(t, 1)
	temporary := t.TempDir()
	n := node.ForTest(t, node.Options{FirstStart: true, Args: []string{"--disable", "istio,metrics-server"}, Env: []string{"TMPDIR=" + temporary}})
	nft := shippedNFT(t)
	plantForeign(t, n, nft)
	before := look(t, n, nft)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	deploySurvivors(t, n)
	n.Apply(t, volumeManifests)
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/volumes", "-n", "e2e-reset", "--timeout=120s")
	n.Eventually(t, time.Minute, func() (bool, string) { return echoes(n, 8088) })

	// No one can confirm, or someone declines.
	for _, input := range []string{"", "\n", "n\n"} {
		cmd := n.PolymeshCommand(t.Context(), "reset", "--kubeconfig", n.Kubeconfig())
		cmd.Stdin = strings.NewReader(input)
		stdout, stderr := outputs(t, cmd, 1)
		wantLine(t, stderr, "nothing was changed")
		list, _, asked := strings.Cut(stdout, "Continue? [y/N]")
		for _, want := range []string{
			"the running server, process ", "the network interface cni0", "the packet filter table ip kube-proxy", "the kubeconfig " + n.Kubeconfig(),
			"the data dir " + n.DataDir() + ": agent, data, server, storage", "the folder " + n.Layout().Run(),
		} {
			if !asked || !strings.Contains(list, want) {
				t.Errorf("before it asks, reset does not name %q:\n%s", want, stdout)
			}
		}
	}
	// A typing error in the data dir, or another one, takes nothing of this server.
	none := filepath.Join(n.Dir, "typing-error")
	stdout, _ := outputs(t, n.PolymeshCommand(t.Context(), "reset", "--yes", "--data-dir", none, "--kubeconfig", n.Kubeconfig()), 0)
	if stdout != none+" does not exist: nothing was removed\n" {
		t.Errorf("reset of a data dir that does not exist prints %q", stdout)
	}
	if ok, what := echoes(n, 8088); !ok {
		t.Errorf("after a reset that was declined: %s", what)
	}

	resetLeavesNothing(t, n, nft, before)
	left, err := os.ReadDir(temporary)
	if err != nil || len(left) > 0 {
		t.Errorf("the server's folder for temporary files holds %v (%v)", left, err)
	}
}

// plantForeign makes things on the node that are not the server's.
func plantForeign(t *testing.T, n *node.Node, nft string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	sleep := n.Command(ctx, "sleep", "3600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = sleep.Wait() // killed
	})
	for _, command := range [][]string{
		{"ip", "link", "add", "other0", "type", "bridge"},
		{"ip", "address", "add", "192.0.2.1/24", "dev", "other0"},
		{nft, "add table ip other; add chain ip other input { type filter hook input priority 0; }; add rule ip other input accept"},
	} {
		if out, err := n.Command(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
		}
	}
	// nsenter becomes sleep a moment after it has started.
	for deadline := time.Now().Add(10 * time.Second); !slices.Contains(processes(t, n), "sleep 3600"); time.Sleep(probePause) {
		if time.Now().After(deadline) {
			t.Fatal("sleep does not run")
		}
	}
}

// A folder that no server made is not deleted.
func TestResetRefusesAForeignFolder(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{})
	dir := filepath.Join(n.Dir, "precious")
	if err := os.MkdirAll(filepath.Join(dir, "server"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "letters.txt")
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dataDir := range []string{dir, n.Dir, "/etc"} {
		_, stderr := outputs(t, n.PolymeshCommand(t.Context(), "reset", "--yes", "--data-dir", dataDir, "--kubeconfig", dir), 1)
		wantLine(t, stderr, dataDir+" is no data dir of Polymesh")
	}
	// A server does not make such a folder its own, so that a later reset would.
	_, stderr := outputs(t, n.PolymeshCommand(t.Context(), "server", "--data-dir", dir, "--write-kubeconfig", n.Kubeconfig()), 1)
	wantLine(t, stderr, "choose an empty folder with --data-dir")
	for _, path := range []string{file, filepath.Join(dir, "server")} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

// outputs runs a command that must end with an exit code.
func outputs(t *testing.T, cmd *exec.Cmd, code int) (stdout, stderr string) {
	t.Helper()
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("%s ends with %d, want %d: %s%s", strings.Join(cmd.Args, " "), got, code, out.String(), errOut.String())
	}
	return out.String(), errOut.String()
}

// wantLine wants exactly one line, which names the program and what is wrong.
func wantLine(t *testing.T, stderr, want string) {
	t.Helper()
	if strings.Count(stderr, "\n") != 1 || !strings.HasSuffix(stderr, "\n") || !strings.HasPrefix(stderr, "polymesh: ") || !strings.Contains(stderr, want) {
		t.Errorf("on standard error is\n%swant one line \"polymesh: …%s…\"", stderr, want)
	}
}
