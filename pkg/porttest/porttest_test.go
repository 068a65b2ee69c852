package porttest

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// A reserved port can be listened on more than once, and is refused in between.
func TestReserve(t *testing.T) {
	reserved := Loopback(t)
	if other := Loopback(t); other == reserved {
		t.Errorf("%s is reserved twice", reserved)
	}
	for range 2 {
		if _, err := net.Dial("tcp", reserved.String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a connection while nothing listens: %v", err)
		}
		l, err := net.Listen("tcp", reserved.String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", reserved.String())
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		l.Close()
	}
}
