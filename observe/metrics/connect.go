package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// wary connects to addresses that others have chosen: by pods' annotations, users' jobs, redirects, names in DNS. The address is
// checked at the connection, because a name may resolve to a different address each time.
type wary struct {
	reserved []uint16
	dialer   net.Dialer
}

func newWary(reserved []uint16) *wary {
	w := &wary{reserved: reserved}
	w.dialer = net.Dialer{Timeout: 10 * time.Second, ControlContext: w.control}
	return w
}

func (w *wary) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" {
		return nil, fmt.Errorf("%s is not connected: only TCP is", network)
	}
	return w.dialer.DialContext(ctx, network, address)
}

// control is called before each connection, with the resolved address.
func (w *wary) control(_ context.Context, network, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%s %q is not connected: it is not an address", network, address)
	}
	ip := a.Addr().Unmap().WithZone("")
	if why := scrapeconfig.Forbidden(a.Addr()); why != "" {
		return fmt.Errorf("%s is not connected: %s", a, why)
	}
	if !slices.Contains(w.reserved, a.Port()) {
		return nil
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("%s is not connected: list this machine's addresses: %w", a, err)
	}
	for _, o := range own {
		n, ok := o.(*net.IPNet)
		if !ok {
			continue
		}
		if addr, ok := netip.AddrFromSlice(n.IP); ok && addr.Unmap() == ip {
			return fmt.Errorf("%s is not connected: port %d of this machine is Kubernetes' own", a, a.Port())
		}
	}
	return nil
}

// post sends alerts to Alertmanagers. It replaces the notifier's own clients, which connect to any address.
func (w *wary) post() func(context.Context, *http.Client, *http.Request) (*http.Response, error) {
	client := &http.Client{
		Transport: &http.Transport{DialContext: w.dial, MaxIdleConnsPerHost: 1, IdleConnTimeout: 5 * time.Minute, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("an Alertmanager that redirects is not used")
		},
	}
	return func(ctx context.Context, _ *http.Client, r *http.Request) (*http.Response, error) {
		return client.Do(r.WithContext(ctx))
	}
}
