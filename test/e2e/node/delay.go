package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Delay delays everything that a node sends and receives by this time, so a round trip takes twice that longer. 0 ends it. Packets in
// transit when it begins or ends may be lost, as on any network.
//
// Not every kernel has tc's netem, so frames go through this program instead: a TAP device replaces the node's port in the bridge,
// and each frame waits between the two.
func (c *Cluster) Delay(n *Node, d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case n.cluster != c:
		return fmt.Errorf("%s is not a node of the cluster %s", n.Name, c.Name)
	case d < 0:
		return fmt.Errorf("a delay of %s", d)
	case n.off != nil:
		n.off.delay = d
		return nil
	}
	return n.setDelay(d)
}

func (n *Node) setDelay(d time.Duration) error {
	switch {
	case d == 0:
		return n.stopDelay()
	case n.delay != nil:
		n.delay.wait.Store(int64(d))
		return nil
	}
	wires, end := string(n.cluster.wires), port(n.number)
	if err := ip(
		// The node segments what it sends itself: a virtio header cannot describe a large encapsulated segment.
		"-n "+string(n.inside)+" link set eth0 gso_max_segs 1",
		"-n "+wires+" link set "+end+" nomaster",
	); err != nil {
		return err
	}
	r := &relay{}
	r.wait.Store(int64(d))
	err := n.cluster.wires.do(func() (err error) {
		if r.end, err = openPacket(end); err != nil {
			return err
		}
		r.tap, err = openTap(end + delayed)
		return err
	})
	if err == nil {
		err = ip("-n " + wires + " link set " + end + delayed + " master br0 up")
	}
	if err != nil {
		r.close()
		return errors.Join(fmt.Errorf("delay the traffic of node %s: %w", n.Name, err), ip("-n "+wires+" link set "+end+" master br0"))
	}
	r.start()
	n.delay = r
	return nil
}

// stopDelay connects the wire to the bridge again.
func (n *Node) stopDelay() error {
	if n.delay == nil {
		return nil
	}
	n.delay.close()
	n.delay = nil
	return ip(
		"-n "+string(n.cluster.wires)+" link set "+port(n.number)+" master br0",
		"-n "+string(n.inside)+" link set eth0 gso_max_segs 65535",
	)
}

// relay forwards frames between the node's end of the wire and the bridge. Each starts with a virtio header, which contains where a
// checksum must still be written.
type relay struct {
	end, tap *os.File
	wait     atomic.Int64 // nanoseconds
	running  sync.WaitGroup
}

// maxFrame is the size of a virtio header with the longest frame; maxQueue is how many frames wait in one direction. Others are lost,
// as in any queue of a network.
const (
	maxFrame = 10 + 18 + 1<<16
	maxQueue = 10_000
)

func (r *relay) start() {
	for _, way := range [][2]*os.File{{r.end, r.tap}, {r.tap, r.end}} {
		type frame struct {
			at   time.Time
			data []byte
		}
		queue := make(chan frame, maxQueue)
		r.running.Go(func() {
			defer close(queue)
			buffer := make([]byte, maxFrame)
			for {
				n, err := way[0].Read(buffer)
				switch {
				case errors.Is(err, unix.ENETDOWN): // returned once; reads continue when the interface is up again
					continue
				case err != nil:
					return
				}
				select {
				case queue <- frame{time.Now().Add(time.Duration(r.wait.Load())), append([]byte(nil), buffer[:n]...)}:
				default:
				}
			}
		})
		r.running.Go(func() {
			for f := range queue {
				time.Sleep(time.Until(f.at))
				_, _ = way[1].Write(f.data) // a frame that cannot be written is lost
			}
		})
	}
}

func (r *relay) close() {
	for _, f := range []*os.File{r.end, r.tap} {
		if f != nil {
			f.Close()
		}
	}
	r.running.Wait()
}

// openPacket reads and writes the frames of an interface of the thread's network namespace (packet(7)).
func openPacket(name string) (*os.File, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	for _, option := range [][3]int{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16 << 20},
	} {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, option[0], option[1], option[2]))
		}
	}
	if err == nil {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network byte order
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}))
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openTap creates a TAP device in the thread's network namespace. It exists until the file is closed.
func openTap(name string) (*os.File, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: device, Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Only now: a poller accepts it only when it is a device.
	return os.NewFile(uintptr(fd), device), nil
}
