package component

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	restartMin = 500 * time.Millisecond
	restartMax = 30 * time.Second
	// restartReset is how long a child must have run for the restart delay to be reset.
	restartReset = 2 * time.Minute
	// outputWait is how long a child's output is read after its end. A grandchild that holds the output open must not
	// keep the child from being restarted.
	outputWait = 2 * time.Second
)

// Child is the running part of a component that is a separate program. It is restarted whenever it exits, after a
// delay that doubles each time. It dies with this process, so that a new server never meets the old one's child: the
// kernel kills it, because a child that is asked to stop could take its time or not stop at all.
type Child struct {
	Path   string
	Args   []string
	Env    []string
	Output io.Writer
	Log    *slog.Logger

	pid    atomic.Int64
	cancel context.CancelFunc
	done   chan struct{}
}

// PID is the process id, 0 if it is not running.
func (c *Child) PID() int { return int(c.pid.Load()) }

// Start starts the program and returns an error if the first attempt fails.
func (c *Child) Start(ctx context.Context) error {
	ctx, c.cancel = Running(ctx)
	c.done = make(chan struct{})
	first := make(chan error, 1)
	go c.supervise(ctx, first)
	return <-first
}

func (c *Child) supervise(ctx context.Context, first chan<- error) {
	defer close(c.done)
	// The kernel sends Pdeathsig when the thread that created the child exits, so that thread must be kept.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pause := restartMin
	for begin := time.Now(); ; begin = time.Now() {
		cmd := exec.Command(c.Path, c.Args...)
		cmd.Env, cmd.Stdout, cmd.Stderr = c.Env, c.Output, c.Output
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		cmd.WaitDelay = outputWait
		err := cmd.Start()
		if first != nil {
			first <- err
			if err != nil {
				return
			}
			first = nil
		}
		if err == nil {
			c.pid.Store(int64(cmd.Process.Pid))
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
			err = cmd.Wait()
			stop()
			c.pid.Store(0)
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > restartReset {
			pause = restartMin
		}
		c.Log.Error("process exited, restarting", "path", c.Path, "err", err, "pause", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, restartMax)
	}
}

// Stop ends the program and waits for it; if ctx ends first, it is killed.
func (c *Child) Stop(ctx context.Context) error {
	if c.cancel == nil {
		return nil
	}
	c.cancel()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
	}
	if pid := c.PID(); pid != 0 {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill %s: %w", c.Path, err)
		}
	}
	<-c.done
	return nil
}
