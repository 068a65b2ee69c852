package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The networks that a build can have.
const (
	// NetworkPrivate reaches what this machine reaches, except its loopback addresses: a separate network namespace with
	// slirp4netns.
	NetworkPrivate = "private"
	NetworkHost    = "host" // the machine's own
	NetworkNone    = "none"
)

// Networks returns the values of Source.Network.
func Networks() []string { return []string{NetworkPrivate, NetworkHost, NetworkNone} }

// confine is the first process in a build's namespaces. It prints its process id outside of them, waits until the network is
// ready, and becomes the engine, which then sees only its own processes, and only the devices that every container has: a block
// device would give access to the whole disk. $1 is an empty folder, $2 a resolv.conf or empty.
const confine = `set -eu
umask 022 # of the files that RUN makes: in the image another user reads them
read -r pid rest </proc/self/stat
echo "$pid"
read -r ready
exec </dev/null >&2
scratch=$1 resolv=$2
shift 2
mount -t tmpfs -o mode=0755,nosuid tmpfs "$scratch"
for name in null zero full random urandom tty; do
	: >"$scratch/$name"
	mount --bind "/dev/$name" "$scratch/$name"
done
if [ "$(id -u)" = 0 ] && [ -e /dev/fuse ] && [ -n "${_CONTAINERS_USERNS_CONFIGURED:-}" ]; then
	: >"$scratch/fuse" # fuse-overlayfs, the storage of a user who is not root
	mount --bind /dev/fuse "$scratch/fuse"
fi
mkdir "$scratch/pts" "$scratch/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$scratch/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$scratch/shm"
ln -s pts/ptmx "$scratch/ptmx"
ln -s /proc/self/fd "$scratch/fd"
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%%:*}" "$scratch/${n#*:}"; done
mount --rbind "$scratch" /dev
mount -t proc proc /proc
if [ -n "$resolv" ]; then
	mount --bind "$resolv" /etc/resolv.conf
else
	ip link set lo up 2>/dev/null || true # tests in a build talk to themselves; slirp4netns does the same
fi
exec "$@"`

// runConfined runs a build in separate namespaces: its processes see no other ones, no device of this machine, and only the
// requested network. It ends with all of its processes.
func (e engine) runConfined(ctx context.Context, log io.Writer, doing, network string, env []string, args ...string) error {
	if network == "" {
		network = NetworkPrivate
	}
	if !slices.Contains(Networks(), network) {
		return fmt.Errorf("network %q is not one of %s", network, strings.Join(Networks(), ", "))
	}
	dir, err := os.MkdirTemp("", "polymesh-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	scratch, resolv := filepath.Join(dir, "dev"), ""
	if err := os.Mkdir(scratch, 0o755); err != nil {
		return err
	}
	if network == NetworkPrivate {
		if err := privateNetworkWorks(env); err != nil {
			return err
		}
		resolv = filepath.Join(dir, "resolv.conf")
		if err := os.WriteFile(resolv, resolvConf("/etc/resolv.conf"), 0o644); err != nil {
			return err
		}
	}
	argv := []string{"unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"}
	if network != NetworkHost {
		argv = append(argv, "--net")
	}
	argv = append(argv, "--", "sh", "-c", confine, "sh", scratch, resolv, e.program)
	if os.Geteuid() != 0 {
		argv = append([]string{e.program, "unshare"}, argv...) // the user namespace that the engine would create
	}
	argv = append(argv, args...)

	var tail bytes.Buffer
	var pid int
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Stderr = io.MultiWriter(log, &tail)
	cmd.Cancel = func() error {
		if pid > 0 {
			return syscall.Kill(pid, syscall.SIGINT)
		}
		return cmd.Process.Kill()
	}
	cmd.WaitDelay = 10 * time.Second
	ready, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	// Not cmd's pipe, which Wait would close while the first process may still write.
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	cmd.Stdout = in
	err = cmd.Start()
	in.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		if pid, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
			err = fmt.Errorf("the build's first process reports %q", line)
		}
	}
	var problem error
	if err == nil && network == NetworkPrivate {
		var stop func()
		if stop, problem = connect(ctx, pid); problem == nil {
			defer stop()
		}
	}
	if err == nil && problem == nil {
		_, err = io.WriteString(ready, "\n")
	}
	if err != nil || problem != nil {
		cmd.Process.Kill()
	}
	ready.Close()
	waited := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
	case problem != nil:
		return fmt.Errorf("%s: %w", doing, problem)
	case waited != nil:
		return &BuildError{Doing: doing, Err: waited, Output: tail.String()}
	}
	return nil
}

// connect connects the network namespace of a process with slirp4netns. stop ends it; it also ends with this program.
func connect(ctx context.Context, pid int) (stop func(), err error) {
	ready, readyIn, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	exit, exitIn, err := os.Pipe()
	if err != nil {
		readyIn.Close()
		return nil, err
	}
	var out bytes.Buffer
	argv := []string{"slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
		"--ready-fd=3", "--exit-fd=4", strconv.Itoa(pid), "tap0"}
	if os.Geteuid() == 0 {
		// Its sandbox unmounts everything that it does not need. For root, shared mounts would also be unmounted on the machine,
		// because it makes only / private (create_sandbox in slirp4netns' sandbox.c). In a mount namespace that is private as a
		// whole, they are not.
		argv = append([]string{"unshare", "--mount", "--propagation", "private", "--"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.ExtraFiles = []*os.File{readyIn, exit}
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Start()
	readyIn.Close()
	exit.Close()
	if err != nil {
		exitIn.Close()
		return nil, err
	}
	stop = func() {
		exitIn.Close()
		cmd.Wait()
	}
	if n, err := ready.Read(make([]byte, 1)); n == 0 || err != nil {
		stop()
		return nil, fmt.Errorf("slirp4netns does not give the build a network (%s): build in this machine's own with --build-network host", lastLine(out.Bytes()))
	}
	return stop, nil
}

// privateNetworkWorks returns an error for what would fail later without a reason.
func privateNetworkWorks(env []string) error {
	if _, err := exec.LookPath("slirp4netns"); err != nil {
		return errors.New("slirp4netns is not installed, which gives a build a separate network: apt-get install slirp4netns, or build in this machine's network with --build-network host")
	}
	return loopbackProxy(env)
}

// loopbackProxy returns an error if the proxy can be reached only in the machine's own network.
func loopbackProxy(env []string) error {
	for _, variable := range env {
		key, value, _ := strings.Cut(variable, "=")
		if !slices.Contains([]string{"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}, strings.ToUpper(key)) || value == "" {
			continue
		}
		u, err := url.Parse(value)
		if err != nil || u.Host == "" {
			u, err = url.Parse("http://" + value)
		}
		if err != nil {
			continue
		}
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
			return fmt.Errorf("the proxy in %s is at %s, which a build in a separate network does not reach: build in this machine's network with --build-network host, or name the proxy by another address", key, u.Host)
		}
	}
	return nil
}

// slirpDNS forwards to the machine's name server, even on a loopback address (slirp4netns(1)).
const slirpDNS = "10.0.2.3"

// resolvConf returns the machine's resolv.conf for a build with slirp4netns: its search domains and options, with that name server.
func resolvConf(file string) []byte {
	lines := []string{"nameserver " + slirpDNS}
	text, _ := os.ReadFile(file) // a machine may have none
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && slices.Contains([]string{"search", "domain", "options"}, fields[0]) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}

var argName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// engineReads matches variables that an engine's own program reads, or those that start it.
var engineReads = regexp.MustCompile(`^(PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|IFS|ENV|PS[0-9]|PWD|OLDPWD|LANG|GODEBUG|GOTRACEBACK|GOGC|GOMEMLIMIT|GOMAXPROCS|GOCOVERDIR|GCONV_PATH|` +
	`(LD|LC|XDG|DBUS|SSL_CERT|CONTAINERS?|_CONTAINERS|BUILDAH|PODMAN|STORAGE|REGISTRY|REGISTRIES|DOCKER|BUILDKIT|BUILDX|NETAVARK|LISTEN|NOTIFY)_.*)$`)

// buildArgs passes build arguments to an engine in its environment: command-line arguments are visible to all local users.
func buildArgs(values map[string]string) (flags, env []string, err error) {
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if !argName.MatchString(name) {
			return nil, nil, fmt.Errorf("build argument %q: a name has letters, digits and _ only", name)
		}
		if engineReads.MatchString(name) {
			return nil, nil, fmt.Errorf("build argument %s: the program that builds reads a variable of that name itself: choose another one", name)
		}
		flags = append(flags, "--build-arg", name)
		env = append(env, name+"="+values[name])
	}
	return flags, env, nil
}
