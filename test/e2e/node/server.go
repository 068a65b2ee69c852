package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/status"
)

// process is a running server, ours or build/up's.
type process struct {
	pid  int
	done chan struct{} // closed when it has ended
	err  error         // how, once it has ended
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Start starts the server and returns immediately: WaitReady waits for it.
func (n *Node) Start(ctx context.Context) error {
	if n.server.running() {
		return fmt.Errorf("the server of node %s runs already", n.Name)
	}
	if n.off != nil {
		return fmt.Errorf("the node %s has no power", n.Name)
	}
	if err := n.prepare(ctx); err != nil {
		return err
	}
	log, err := os.OpenFile(n.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	enter, err := n.enter()
	if err != nil {
		return err
	}
	args := append(enter, n.program, "server", "--data-dir", n.DataDir(), "--write-kubeconfig", n.Kubeconfig())
	if server := n.opts.Joins; server != nil {
		token := server.Layout().NodeToken()
		if n.opts.Serves {
			token = server.Layout().ServerToken()
		} else {
			args = append(enter, n.program, "agent", "--data-dir", n.DataDir())
		}
		args = append(args, "--server", "https://"+server.Address()+":6443")
		if !slices.ContainsFunc(slices.Concat(n.opts.Args, n.opts.Env), func(s string) bool { return strings.Contains(strings.ToLower(s), "token") }) {
			args = append(args, "--token-file", token)
		}
	}
	if !n.opts.Observe && n.opts.Joins == nil && n.program == n.tested {
		if slices.Contains(n.opts.Args, "--config") {
			return errors.New("a flag takes the place of what a config file disables: set Observe, and disable it in the file")
		}
		args = append(args, "--disable", "observe")
	}
	args = append(args, n.opts.Args...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = environment()
	if n.prepares {
		cmd.Env = append(cmd.Env, GOGC)
	}
	cmd.Env = append(cmd.Env, n.opts.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	// A separate process group: an interrupt at the terminal is for the tests, which then end the server.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	p := &process{pid: cmd.Process.Pid, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	n.server = p
	return ctx.Err()
}

// enter returns the command line before what runs on the node. nsenter executes the program, so it keeps its pid.
func (n *Node) enter() ([]string, error) {
	args := n.namespaces()
	if n.opts.NoNameserver {
		none := filepath.Join(n.Dir, "resolv.conf")
		args = append(args, "unshare", "--mount", "--propagation", "slave", "--", "sh", "-c",
			`: >"$0" && mount --bind "$0" /etc/resolv.conf && exec "$@"`, none)
	}
	if n.opts.Umask != "" {
		args = append(args, "sh", "-c", `umask "$0" && exec "$@"`, n.opts.Umask)
	}
	procs, err := n.limit()
	if err != nil {
		return nil, err
	}
	for _, file := range procs {
		args = append(args, "sh", "-c", `echo $$ >"$0" && exec "$@"`, file)
	}
	return args, nil
}

// PID returns the server's process id, 0 if none runs.
func (n *Node) PID() int {
	if !n.server.running() {
		return 0
	}
	return n.server.pid
}

// Stop ends the server gracefully and waits for that. Pods keep running.
func (n *Node) Stop(ctx context.Context) error { return n.end(ctx, syscall.SIGTERM) }

// Kill kills the server and waits for that.
func (n *Node) Kill() error { return n.end(context.Background(), syscall.SIGKILL) }

func (n *Node) end(ctx context.Context, signal syscall.Signal) error {
	if !n.server.running() {
		return nil
	}
	if err := syscall.Kill(n.server.pid, signal); err != nil {
		return fmt.Errorf("signal the server: %w", err)
	}
	select {
	case <-n.server.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the server (process %d) does not end: %w", n.server.pid, ctx.Err())
	}
}

// Exited is closed when the server has ended.
func (n *Node) Exited() <-chan struct{} {
	if n.server == nil {
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	return n.server.done
}

// Report returns the running server's report about its components.
func (n *Node) Report(ctx context.Context) (*status.Report, error) {
	return status.Ask(ctx, n.Layout().StatusSocket())
}

// Ready waits until every component is ready. It fails immediately if the server ends.
func (n *Node) Ready(ctx context.Context) error {
	missing := errors.New("the server does not respond yet")
	for {
		report, err := n.Report(ctx)
		switch {
		case err == nil && report.Ready:
			return nil
		case err == nil:
			missing = notReady(report)
		case ctx.Err() == nil:
			missing = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server of node %s is not ready: %w", n.Name, missing)
		case <-n.Exited():
			return fmt.Errorf("the server of node %s has ended (%w); last: %w; its log ends with:\n%s", n.Name, n.exitError(), missing, tail(n.Log(), 15))
		case <-time.After(poll):
		}
	}
}

func (n *Node) exitError() error {
	if n.server == nil {
		return errors.New("it was not started")
	}
	if n.server.err == nil {
		return errors.New("exit code 0")
	}
	return n.server.err
}

func notReady(r *status.Report) error {
	var what []string
	for _, c := range r.Components {
		if c.State != "Ready" {
			what = append(what, fmt.Sprintf("%s is %s: %s", c.Name, c.State, c.Message))
		}
	}
	return errors.New(strings.Join(what, "; "))
}

// Reset runs `polymesh reset` and returns what it prints.
func (n *Node) Reset(ctx context.Context) (string, error) {
	return n.run(ctx, n.program, "reset", "--yes", "--data-dir", n.DataDir(), "--kubeconfig", n.Kubeconfig())
}

// Up runs the script of `make up` on the node, and returns what it prints. The server that it starts becomes the node's server.
func (n *Node) Up(ctx context.Context) (string, error) {
	out, err := n.script(ctx, "up")
	if err != nil {
		return out, err
	}
	report, err := n.Report(ctx)
	if err == nil && n.PID() != report.PID {
		n.server, err = adopt(report.PID)
	}
	return out, err
}

// Down runs the script of `make down` on the node, and returns what it prints.
func (n *Node) Down(ctx context.Context) (string, error) { return n.script(ctx, "down", "--yes") }

func (n *Node) script(ctx context.Context, name string, args ...string) (string, error) {
	top, err := Top()
	if err != nil {
		return "", err
	}
	settings, err := yaml.Marshal(map[string][]string{"kubelet-arg": kubeletArgs()})
	if err != nil {
		return "", err
	}
	config := filepath.Join(n.Dir, "config.yaml")
	if err := os.WriteFile(config, settings, 0o600); err != nil {
		return "", err
	}
	cmd := n.Command(ctx, filepath.Join(top, "build", name), args...)
	cmd.Env = append(cmd.Env, "POLYMESH_CONFIG="+config, "POLYMESH_BIN="+n.program, "POLYMESH_WRITE_KUBECONFIG="+n.Kubeconfig(), "POLYMESH_LOG="+n.Log())
	cmd.Env = append(cmd.Env, n.opts.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	// The server outlives the script and must not hold its output open.
	out, err := os.CreateTemp(n.Dir, name+"-*.log")
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	text, _ := os.ReadFile(out.Name())
	if err != nil {
		return string(text), fmt.Errorf("build/%s: %w: %s", name, err, text)
	}
	return string(text), nil
}

// adopt watches a process that is not a child.
func adopt(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	p := &process{pid: pid, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		defer unix.Close(fd)
		for {
			events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(events, -1); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	return p, nil
}

// environment returns this process's, without the settings of a Polymesh on this machine.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "POLYMESH_") || strings.HasPrefix(kv, "KUBECONFIG=")
	})
}
