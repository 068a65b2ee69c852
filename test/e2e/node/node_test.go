//go:build e2e

package node

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What this program is started as once more: a run that leaves a cluster until it is killed, or a server on a node that
// sends back what it gets, at this address.
const (
	leaveEnv = "POLYMESH_E2E_LEAVE"
	echoEnv  = "E2E_ECHO"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(echoEnv); address != "" {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("listens")
		echo(listener)
	}
	if err := Guard(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if os.Getenv(leaveEnv) != "" {
		if err := leave(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		select {}
	}
	os.Exit(m.Run())
}

// leave makes a cluster with all that can be there, and prints what is to be gone with it.
func leave() error {
	c, err := NewCluster()
	if err != nil {
		return err
	}
	left := []string{c.outside.path(), c.wires.path(), c.Dir}
	var nodes []*Node
	for range 2 {
		n, err := c.Add(Options{})
		if err != nil {
			return err
		}
		left, nodes = append(left, n.inside.path(), n.Dir), append(nodes, n)
	}
	sleep := nodes[0].Command(context.Background(), "sleep", "3600")
	if err := errors.Join(c.Partition(nodes[0], nodes[1]), c.Delay(nodes[0], time.Millisecond), c.PowerOff(nodes[1]), sleep.Start()); err != nil {
		return err
	}
	// Without power a node is its folder.
	left = slices.DeleteFunc(left, func(path string) bool { return path == nodes[1].inside.path() })
	fmt.Println(strings.Join(append(left, fmt.Sprintf("/proc/%d/ns/net", sleep.Process.Pid)), " "))
	return nil
}

// echo sends back what it gets.
func echo(listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer connection.Close()
			_, _ = io.Copy(connection, connection)
		}()
	}
}

func TestNetwork(t *testing.T) {
	n := ForTest(t, Options{})
	listener, err := n.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	outside, err := n.ListenOutside("tcp", OutsideHost+":80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RemoteAddr) })}
	go func() { _ = server.Serve(listener) }()
	go func() { _ = server.Serve(outside) }()
	defer server.Close()
	for _, keep := range []bool{false, true} {
		client := n.HTTP(keep)
		seen := map[string]bool{}
		for range 3 {
			resp, err := client.Get("http://" + n.Address())
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !strings.HasPrefix(string(body), n.OutsideAddress()+":") {
				t.Errorf("the caller is %s (%v), want %s", body, err, n.OutsideAddress())
			}
			seen[string(body)] = true
		}
		if want := map[bool]int{false: 3, true: 1}[keep]; len(seen) != want {
			t.Errorf("keep %v: %d connections, want %d", keep, len(seen), want)
		}
	}
	// The node calls back.
	resp, err := n.HTTPInside(false).Get("http://" + OutsideHost)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || !strings.HasPrefix(string(body), n.Address()+":") {
		t.Errorf("the caller is %s (%v), want %s", body, err, n.Address())
	}
	// The outside world has nothing else, and rejects connections.
	if _, err := n.Dial(t.Context(), "tcp", "192.0.2.1:80"); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("got %v, want no route to host", err)
	}
}

// echoOn starts a server on a node that sends back what it gets, as a process of the node.
func echoOn(t *testing.T, n *Node, address string) *exec.Cmd {
	t.Helper()
	cmd := n.Command(t.Context(), os.Args[0])
	cmd.Env = append(cmd.Env, echoEnv+"="+address)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "listens\n" {
		t.Fatalf("the server sends %q, %v", line, err)
	}
	return cmd
}

// connection is one to a server that sends back what it gets.
type connection struct {
	*net.TCPConn
	in chan string // what comes, or how it ended
}

func connect(t *testing.T, dial func(context.Context, string, string) (net.Conn, error), address string) *connection {
	t.Helper()
	dialled, err := dial(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	c := &connection{dialled.(*net.TCPConn), make(chan string, 10)}
	t.Cleanup(func() { c.Close() })
	go func() {
		defer close(c.in)
		buffer := make([]byte, 100)
		for {
			n, err := c.Read(buffer)
			if err != nil {
				c.in <- err.Error()
				return
			}
			c.in <- string(buffer[:n])
		}
	}()
	c.says(t, "hello")
	c.hears(t, "hello")
	return c
}

func (c *connection) says(t *testing.T, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func (c *connection) hears(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-c.in:
		if !strings.Contains(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	case <-time.After(time.Minute):
		t.Fatalf("got nothing, want %q", want)
	}
}

// hearsNothing sends data until the kernel has retransmitted it several times, and checks that the connection is still open.
func (c *connection) hearsNothing(t *testing.T) {
	t.Helper()
	sent := func() int {
		again, err := Retransmissions(c)
		if err != nil {
			t.Fatal(err)
		}
		return again
	}
	before := sent()
	c.says(t, "is anyone there?")
	wait(t, func() (bool, string) {
		select {
		case got := <-c.in:
			t.Fatalf("got %q, want nothing", got)
		default:
		}
		again := sent() - before
		return again >= 2, fmt.Sprintf("it was sent again %d times", again)
	})
}

// wait is Eventually without a server.
func wait(t *testing.T, condition func() (bool, string)) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(poll) {
		ok, what := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still not after a minute: %s", what)
		}
	}
}

func TestClusterNetwork(t *testing.T) {
	c := ClusterForTest(t)
	var nodes []*Node
	for i := range 3 {
		n := c.AddForTest(t, Options{})
		if want := fmt.Sprintf("198.18.0.%d", i+2); n.Address() != want {
			t.Errorf("%s has the address %s, want %s", n.Name, n.Address(), want)
		}
		if out, err := n.Command(t.Context(), "hostname").Output(); string(out) != fmt.Sprintf("node-%d\n", i+1) {
			t.Errorf("the host name of %s is %q (%v)", n.Name, out, err)
		}
		listener, err := n.Listen("tcp", n.Address()+":7")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go echo(listener)
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		connect(t, n.DialOutside, n.Address()+":7")
		for _, other := range nodes {
			connect(t, n.Dial, other.Address()+":7")
		}
	}
	outside, err := nodes[0].ListenOutside("tcp", OutsideHost+":7")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	go echo(outside)
	for _, n := range nodes {
		connect(t, n.Dial, OutsideHost+":7")
	}
	// Another cluster has the same addresses and sees none of it.
	n := ClusterForTest(t).AddForTest(t, Options{Hostname: "other"})
	if out, err := n.Command(t.Context(), "hostname").Output(); string(out) != "other\n" {
		t.Errorf("the host name is %q (%v), want other", out, err)
	}
	if n.Address() != nodes[0].Address() {
		t.Errorf("the first node of another cluster has the address %s, want %s", n.Address(), nodes[0].Address())
	}
	if _, err := n.Dial(t.Context(), "tcp", nodes[1].Address()+":7"); err == nil {
		t.Error("a node of another cluster answers")
	}
	// The address of a node that has gone is not given to another.
	if err := nodes[2].Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := c.AddForTest(t, Options{}); n.Address() != "198.18.0.5" {
		t.Errorf("the fourth node has the address %s", n.Address())
	}
}

func TestPartition(t *testing.T) {
	c := ClusterForTest(t)
	a, b, third := c.AddForTest(t, Options{}), c.AddForTest(t, Options{}), c.AddForTest(t, Options{})
	echoOn(t, b, ":7")
	connection, beside, outside := connect(t, a.Dial, b.Address()+":7"), connect(t, third.Dial, b.Address()+":7"), connect(t, a.DialOutside, b.Address()+":7")
	if err := c.Partition(a, b); err != nil {
		t.Fatal(err)
	}
	connection.hearsNothing(t)
	beside.says(t, "beside")
	beside.hears(t, "beside")
	outside.says(t, "outside")
	outside.hears(t, "outside")
	if err := c.Partition(third, a, b); err != nil {
		t.Fatal(err)
	}
	beside.hearsNothing(t)
	if err := c.Heal(b, a); err != nil {
		t.Fatal(err)
	}
	connection.hears(t, "is anyone there?")
	if len(beside.in) > 0 {
		t.Errorf("after the other partition was healed, %q came through", <-beside.in)
	}
	if err := c.Heal(b, third); err != nil {
		t.Fatal(err)
	}
	beside.hears(t, "is anyone there?")
	if err := c.Partition(a, a); err == nil {
		t.Error("a node was disconnected from itself")
	}
	if err := ClusterForTest(t).Partition(a, b); err == nil {
		t.Error("nodes of another cluster were disconnected")
	}
}

func TestDelay(t *testing.T) {
	c := ClusterForTest(t)
	a, b := c.AddForTest(t, Options{}), c.AddForTest(t, Options{})
	listener, err := b.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go echo(listener)
	connection := connect(t, a.Dial, b.Address()+":7")
	roundTrip := func() time.Duration {
		t.Helper()
		begin := time.Now()
		connection.says(t, "there and back")
		connection.hears(t, "there and back")
		return time.Since(begin)
	}
	for _, step := range []struct {
		n    *Node
		d    time.Duration
		want time.Duration
	}{
		{b, 20 * time.Millisecond, 40 * time.Millisecond},
		{b, 30 * time.Millisecond, 60 * time.Millisecond},
		{a, 50 * time.Millisecond, 160 * time.Millisecond},
		{b, 0, 100 * time.Millisecond},
	} {
		if err := c.Delay(step.n, step.d); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got := roundTrip(); got < step.want {
				t.Errorf("with %s for %s a round trip took %s, want %s at least", step.d, step.n.Name, got, step.want)
			}
		}
	}
	// Much at once is whole: segments are cut and have their checksums.
	bulk, err := a.Dial(t.Context(), "tcp", b.Address()+":7")
	if err != nil {
		t.Fatal(err)
	}
	defer bulk.Close()
	sent := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(sent)
	go func() { _, _ = bulk.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(bulk, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("4 MiB came back broken (%v)", err)
	}
	// A delayed node can be partitioned as well.
	if err := c.Partition(a, b); err != nil {
		t.Fatal(err)
	}
	connection.hearsNothing(t)
	if err := c.Heal(a, b); err != nil {
		t.Fatal(err)
	}
	connection.hears(t, "is anyone there?")
	if err := c.Delay(a, 0); err != nil {
		t.Fatal(err)
	}
	wait(t, func() (bool, string) {
		took := roundTrip()
		return took < 40*time.Millisecond, fmt.Sprintf("without a delay a round trip takes %s", took)
	})
	if err := c.Delay(a, -time.Second); err == nil {
		t.Error("a delay of less than nothing was taken")
	}
}

func TestPower(t *testing.T) {
	c := ClusterForTest(t)
	a, b := c.AddForTest(t, Options{}), c.AddForTest(t, Options{})
	// If a process is killed on a running machine, the kernel ends its connections.
	server := echoOn(t, b, ":7")
	connection := connect(t, a.Dial, b.Address()+":7")
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	connection.hears(t, "EOF")

	server = echoOn(t, b, ":7")
	connection, outside := connect(t, a.Dial, b.Address()+":7"), connect(t, a.DialOutside, b.Address()+":7")
	file := filepath.Join(b.Dir, "file")
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Delay(b, 20*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if err := c.PowerOff(b); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the server has ended with %v, want killed", err)
	}
	connection.hearsNothing(t)
	outside.hearsNothing(t)
	if err := b.Start(t.Context()); err == nil {
		t.Error("a server started without power")
	}
	if err := c.PowerOff(b); err == nil {
		t.Error("power was removed twice")
	}
	if err := c.PowerOn(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	// The machine does not know the connections any more.
	connection.hears(t, "connection reset by peer")
	outside.hears(t, "connection reset by peer")
	if b.PID() != 0 {
		t.Error("a server has started that did not run before")
	}
	if text, err := os.ReadFile(file); string(text) != "text" {
		t.Errorf("the file holds %q (%v)", text, err)
	}
	echoOn(t, b, ":7")
	connection = connect(t, a.Dial, b.Address()+":7")
	begin := time.Now()
	connection.says(t, "the delay is there again")
	connection.hears(t, "the delay is there again")
	if took := time.Since(begin); took < 40*time.Millisecond {
		t.Errorf("a round trip took %s, want 40 ms at least", took)
	}
	if err := c.PowerOn(t.Context(), b); err == nil {
		t.Error("power was given twice")
	}
}

// run starts this program as a run of tests that makes a cluster, and returns what is to be gone with it.
func run(t *testing.T, temporary string, environment ...string) (*exec.Cmd, []string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = slices.Concat(os.Environ(), []string{"TMPDIR=" + temporary}, environment)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.Fields(line)
}

func left(paths []string) (found []string) {
	for _, path := range paths {
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	return found
}

func TestKilledRunLeavesNothing(t *testing.T) {
	for _, next := range []bool{false, true} {
		name, environment := "its watchdog removes all", []string{leaveEnv + "=1"}
		if next {
			// Which has no watchdog, as when that was killed too.
			name, environment = "the next run removes all", append(environment, keepEnv+"=1")
		}
		t.Run(name, func(t *testing.T) {
			temporary := t.TempDir()
			killed, made := run(t, temporary, environment...)
			if found := left(made); len(found) != len(made) || len(made) != 7 {
				t.Fatalf("of %v there is only %v", made, found)
			}
			if err := killed.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = killed.Wait() // killed
			if next {
				if found := left(made); len(found) != len(made) {
					t.Errorf("before the next run, of %v there is only %v", made, found)
				}
				cmd, _ := run(t, temporary)
				if err := cmd.Wait(); err != nil {
					t.Error(err)
				}
			}
			wait(t, func() (bool, string) {
				found := left(made)
				return len(found) == 0, fmt.Sprint("there is still ", found)
			})
		})
	}
}

func TestOtherRunsAreLeftAlone(t *testing.T) {
	here, elsewhere := t.TempDir(), t.TempDir()
	first, made := run(t, here, leaveEnv+"=1")
	second, madeElsewhere := run(t, elsewhere, leaveEnv+"=1")
	for _, temporary := range []string{here, elsewhere} {
		cmd, _ := run(t, temporary)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	if all := append(made, madeElsewhere...); len(left(all)) != len(all) {
		t.Errorf("of %v other runs have left only %v", all, left(all))
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait() // killed
	wait(t, func() (bool, string) { return len(left(made)) == 0, fmt.Sprint("there is still ", left(made)) })
	if len(left(madeElsewhere)) != len(madeElsewhere) {
		t.Errorf("of %v the watchdog of another run has left only %v", madeElsewhere, left(madeElsewhere))
	}
	if err := second.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = second.Wait() // killed
	wait(t, func() (bool, string) {
		return len(left(madeElsewhere)) == 0, fmt.Sprint("there is still ", left(madeElsewhere))
	})
}
