// Package relay passes bytes between two connections, for pkg/forward and the balancer over the API servers (pkg/node/apilb).
package relay

import (
	"io"
	"net"
	"sync"
)

// End is a side of a relay: a TCP connection or that of a UNIX socket.
type End interface {
	net.Conn
	CloseWrite() error
}

// Between copies what each side sends to the other, and the end of it: the other side may still answer. It returns when both directions have
// ended, and has closed both connections then. If one side takes no more, both end: what comes would have no reader. The kernel copies
// (splice), so a connection needs no memory here.
func Between(a, b End) {
	end := func() {
		_ = a.Close()
		_ = b.Close()
	}
	defer end()
	var directions sync.WaitGroup
	for _, way := range [][2]End{{a, b}, {b, a}} {
		from, to := way[0], way[1]
		directions.Go(func() {
			_, err := io.Copy(to, from)
			if err == nil {
				err = to.CloseWrite()
			}
			if err != nil {
				end()
			}
		})
	}
	directions.Wait()
}
