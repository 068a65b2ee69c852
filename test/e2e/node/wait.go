package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const poll = 100 * time.Millisecond

// lasting is a test's context without its end. t.Context() is done before the test's cleanups run, and they put things back
// and wait for them by the same means.
func lasting(t testing.TB) context.Context { return context.WithoutCancel(t.Context()) }

// Eventually asks until the answer is yes. The test fails with what was missing last when the time is over, which says
// nothing about speed: the limit is for something that never comes. Between two questions it waits for longer than one of
// them takes, up to a second: a question may be a whole program, and other nodes run beside this one.
func (n *Node) Eventually(t testing.TB, limit time.Duration, condition func() (ok bool, what string)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(lasting(t), limit)
	defer cancel()
	for {
		asked := time.Now()
		ok, what := condition()
		if ok {
			return
		}
		pause := min(max(poll, 2*time.Since(asked)), time.Second)
		select {
		case <-ctx.Done():
			t.Fatalf("still not after %s: %s", limit, what)
		case <-n.Exited():
			t.Fatalf("the server has ended (%v); before: %s", n.exitError(), what)
		case <-time.After(pause):
		}
	}
}

// WaitReady waits until every component of the server is ready.
func (n *Node) WaitReady(t testing.TB, limit time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(lasting(t), limit)
	defer cancel()
	if err := n.Ready(ctx); err != nil {
		t.Fatal(err)
	}
}

// WaitRollout waits until a Deployment, StatefulSet or DaemonSet ("deployment/name") has rolled out.
func (n *Node) WaitRollout(t testing.TB, namespace, workload string) {
	t.Helper()
	n.Kubectl(t, "rollout", "status", "-n", namespace, workload, "--timeout=180s")
}

// Retransmissions says how often the kernel has sent something on a TCP connection again, because the other end had not
// confirmed it. Where that grows, and a read waits, the network is cut and the connection open: no test has to wait for a time.
func Retransmissions(connection net.Conn) (int, error) {
	c, ok := connection.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("%T is no connection of the kernel's", connection)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	controlErr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) })
	if err := errors.Join(controlErr, err); err != nil {
		return 0, fmt.Errorf("ask the kernel about a connection: %w", err)
	}
	return int(info.Total_retrans), nil
}
