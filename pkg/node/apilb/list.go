package apilb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// slice is the name of the EndpointSlice, in namespace default, that the API servers keep: each renews a lease for its own
// address, and drops those whose lease has expired (pkg/controlplane/reconcilers in k8s.io/kubernetes).
const slice = "kubernetes"

// maxState bounds the file, in bytes: maxServers addresses are a tenth of it.
const maxState = 64 << 10

// state is the content of the file.
type state struct {
	Servers []string `json:"servers"`
}

// Known returns the servers that a node's balancer has written to its file; none if it cannot be read.
func Known(path string) []netip.AddrPort {
	servers, err := readState(path, netip.AddrPort{})
	if err != nil {
		return nil
	}
	return servers
}

// readState returns the servers of the previous run; none if there is no file.
func readState(path string, self netip.AddrPort) ([]netip.AddrPort, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxState {
		return nil, fmt.Errorf("it has more than %d bytes", maxState)
	}
	var s state
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, err
	}
	var found []netip.AddrPort
	for _, text := range s.Servers {
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not an address", text)
		}
		found = append(found, addr)
	}
	return usable(found, self), nil
}

// usable returns the addresses that can be a server's, without duplicates, at most maxServers. The balancer's own would be a loop.
func usable(addrs []netip.AddrPort, self netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range addrs {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		ip := a.Addr()
		bad := !a.IsValid() || a.Port() == 0 || a == self || ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast()
		if !bad && !slices.Contains(out, a) && len(out) < maxServers {
			out = append(out, a)
		}
	}
	return out
}

// keepState writes each new list to the file. known is what the file contains.
func (b *Balancer) keepState(ctx context.Context, save <-chan []netip.AddrPort, known []netip.AddrPort) {
	for {
		var addrs []netip.AddrPort
		select {
		case <-ctx.Done():
			return
		case addrs = <-save:
		}
		slices.SortFunc(addrs, netip.AddrPort.Compare)
		if slices.Equal(addrs, known) {
			continue
		}
		var s state
		for _, a := range addrs {
			s.Servers = append(s.Servers, a.String())
		}
		text, err := json.MarshalIndent(s, "", "  ")
		if err == nil {
			err = atomicfile.Write(b.opts.State, append(text, '\n'), 0o600)
		}
		if err != nil {
			b.log.Error("keep the list of API servers for the next start", "err", err)
			continue
		}
		known = addrs
		b.log.Info("the API servers are", "servers", s.Servers)
	}
}

// resolve keeps the addresses of a configured name current: it is looked up again before each round of checks.
func (b *Balancer) resolve(ctx context.Context) {
	tick := time.NewTicker(b.interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		found, problem := b.configured(ctx)
		b.with(ctx, func(p *pool) { p.configure(found, problem) })
	}
}

// named reports whether the configured server has a name, not an address.
func (b *Balancer) named() bool {
	host, _, err := splitServer(b.opts.Server)
	_, literal := netip.ParseAddr(host)
	return err == nil && literal != nil
}

// configured returns the addresses of the configured server, or why there are none.
func (b *Balancer) configured(ctx context.Context) (found []netip.AddrPort, problem string) {
	host, port, err := splitServer(b.opts.Server)
	if err != nil {
		return nil, err.Error()
	}
	var addrs []netip.Addr
	if literal, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{literal}
	} else if addrs, err = b.lookup(ctx, host); err != nil {
		return nil, err.Error()
	}
	for _, a := range addrs {
		found = append(found, netip.AddrPortFrom(a, port))
	}
	if found = usable(found, b.opts.Listen); len(found) == 0 {
		problem = b.opts.Server + " has no address that can be an API server's"
	}
	return found, problem
}

// lookup returns a name's IPv4 addresses, or all if it has none of these: the API servers of a cluster are on IPv4.
func (b *Balancer) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	addrs, err := b.resolver.LookupNetIP(ctx, "ip", host)
	var v4 []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() {
			v4 = append(v4, a)
		}
	}
	if len(v4) > 0 {
		return v4, nil
	}
	return addrs, err
}

// watch keeps the list of servers current. It asks through the balancer itself, so that it needs one server only, any one.
func (b *Balancer) watch(ctx context.Context) {
	client, err := b.client(ctx)
	if err != nil {
		b.watched(ctx, err)
		return
	}
	slices := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	// The node may read this object only, and RBAC takes its name from the selector.
	only := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, slice).String()
	}
	informer := cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			only(&o)
			list, err := slices.List(ctx, o)
			b.watched(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			only(&o)
			w, err := slices.Watch(ctx, o)
			b.watched(ctx, err)
			return w, err
		},
	}, &discoveryv1.EndpointSlice{}, 0, nil)
	// The default handler logs each end of a watch as an error, and that is how the balancer moves it.
	err = informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		b.log.Debug("watch the list of API servers", "err", err)
	})
	if err == nil {
		_, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { b.take(ctx, o) },
			UpdateFunc: func(_, o any) { b.take(ctx, o) },
		})
	}
	if err != nil {
		b.watched(ctx, err)
		return
	}
	informer.RunWithContext(ctx)
}

// watched records the result of a request for the list.
func (b *Balancer) watched(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil {
		b.watching.Store(nil)
		return
	}
	why := err.Error()
	b.watching.Store(&why)
}

// take passes the servers of an EndpointSlice on.
func (b *Balancer) take(ctx context.Context, o any) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok || s.Name != slice {
		return
	}
	addrs := usable(addresses(s), b.opts.Listen)
	b.with(ctx, func(p *pool) { p.list(addrs); p.tick(ctx) })
}

func addresses(s *discoveryv1.EndpointSlice) []netip.AddrPort {
	var found []netip.AddrPort
	for _, port := range s.Ports {
		if port.Port == nil || *port.Port < 1 || *port.Port > 65535 {
			continue
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, text := range e.Addresses {
				if ip, err := netip.ParseAddr(text); err == nil {
					found = append(found, netip.AddrPortFrom(ip, uint16(*port.Port)))
				}
			}
		}
	}
	return found
}

// client returns a client that connects through the balancer, with the node's identity. It waits until the node has one.
func (b *Balancer) client(ctx context.Context) (*kubernetes.Clientset, error) {
	tick := time.NewTicker(b.interval)
	defer tick.Stop()
	for {
		// Reading the files first: client-go reloads a renewed certificate, but does not wait for the first one.
		_, err := b.tlsConfig()
		if err == nil {
			return kubernetes.NewForConfig(&rest.Config{
				Host:            "https://" + b.listener.Addr().String(),
				TLSClientConfig: rest.TLSClientConfig{CAFile: b.opts.CA, CertFile: b.opts.Cert, KeyFile: b.opts.Key},
			})
		}
		b.watched(ctx, err)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}
