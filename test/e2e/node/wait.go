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

// lasting returns a test's context without its end. t.Context() is done before the test's cleanups run, which use the same functions
// to restore things and wait for them.
func lasting(t testing.TB) context.Context { return context.WithoutCancel(t.Context()) }

// Eventually checks a condition until it is true. After the limit the test fails with what was missing last. The limit is not about
// speed, but for something that never happens. Between two checks it waits longer than a check takes, up to a second: a check may run
// a program, and other nodes run at the same time.
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

// Retransmissions returns how often the kernel has retransmitted on a TCP connection, because the other end did not acknowledge. If it
// grows while a read waits, the network is cut and the connection is open, so no test needs to sleep.
func Retransmissions(connection net.Conn) (int, error) {
	c, ok := connection.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("%T is not a connection of the kernel", connection)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	controlErr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) })
	if err := errors.Join(controlErr, err); err != nil {
		return 0, fmt.Errorf("read the kernel's state of a connection: %w", err)
	}
	return int(info.Total_retrans), nil
}
