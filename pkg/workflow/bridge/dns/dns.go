// Package dns reads services from plain DNS, for pkg/workflow/bridge: from SRV records, which include ports, and from address records
// plus a port given by the user. Istio reads address records itself (a ServiceEntry with resolution: DNS), but not SRV
// records.
package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

// Zone is a list of names in DNS.
type Zone struct {
	resolver *net.Resolver
	server   string
	records  []record
}

// record is a service, and its name in DNS.
type record struct {
	service, name string
	port          int // 0 for SRV records
}

// New parses services written as SERVICE=NAME, where NAME has SRV records (_http._tcp.orders.example.com), or as SERVICE=NAME:PORT,
// where it has addresses. Server is the name server to use, HOST or HOST:PORT; empty for the machine's own.
func New(services []string, server string) (*Zone, error) {
	z := &Zone{resolver: &net.Resolver{PreferGo: true}, server: server}
	for _, s := range services {
		service, name, ok := strings.Cut(s, "=")
		r := record{service: service, name: strings.TrimSuffix(name, ".")}
		if host, port, found := strings.Cut(r.name, ":"); found {
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil || n == 0 {
				return nil, fmt.Errorf("%q: %q is not a port", s, port)
			}
			r.name, r.port = host, int(n)
		}
		if !ok || r.service == "" || r.name == "" {
			return nil, fmt.Errorf("%q should be SERVICE=NAME for SRV records, or SERVICE=NAME:PORT for addresses", s)
		}
		if slices.ContainsFunc(z.records, func(other record) bool { return other.service == r.service }) {
			return nil, fmt.Errorf("%s is listed twice", r.service)
		}
		z.records = append(z.records, r)
	}
	if len(z.records) == 0 {
		return nil, errors.New("no DNS name is specified")
	}
	if server != "" {
		if _, _, err := net.SplitHostPort(server); err != nil {
			server = net.JoinHostPort(strings.Trim(server, "[]"), "53")
		}
		z.resolver.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, server)
		}
	}
	return z, nil
}

// String returns the names and the server.
func (z *Zone) String() string {
	var names []string
	for _, r := range z.records {
		names = append(names, r.name)
	}
	of := ""
	if z.server != "" {
		of = " of " + z.server
	}
	return "DNS" + of + ": " + strings.Join(names, ", ")
}

// Services looks up every name. A name that does not exist is a service without instances; a name server that does not
// respond, or reports a failure, is an error.
func (z *Zone) Services(ctx context.Context) ([]bridge.Service, error) {
	var services []bridge.Service
	for _, r := range z.records {
		instances, err := z.lookup(ctx, r)
		if err != nil {
			return nil, err
		}
		services = append(services, bridge.Service{Name: r.service, Instances: instances})
	}
	return services, nil
}

func (z *Zone) lookup(ctx context.Context, r record) ([]bridge.Instance, error) {
	if r.port != 0 {
		return z.addresses(ctx, r.name, r.port)
	}
	// The name is complete: it includes service and protocol.
	_, targets, err := z.resolver.LookupSRV(ctx, "", "", r.name+".")
	if missing(err) {
		return nil, nil
	}
	// Malformed records are reported as an error next to the valid ones; the response is incomplete.
	if err != nil {
		return nil, fmt.Errorf("look up the SRV records of %s: %w", r.name, err)
	}
	var instances []bridge.Instance
	for _, t := range targets {
		more, err := z.addresses(ctx, strings.TrimSuffix(t.Target, "."), int(t.Port))
		if err != nil {
			return nil, err
		}
		instances = append(instances, more...)
	}
	slices.SortFunc(instances, func(a, b bridge.Instance) int { return strings.Compare(a.ID, b.ID) })
	return slices.CompactFunc(instances, func(a, b bridge.Instance) bool { return a.ID == b.ID }), nil
}

func (z *Zone) addresses(ctx context.Context, name string, port int) ([]bridge.Instance, error) {
	found, err := z.resolver.LookupNetIP(ctx, "ip", name+".")
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up the addresses of %s: %w", name, err)
	}
	var instances []bridge.Instance
	for _, a := range found {
		address := a.Unmap().String()
		instances = append(instances, bridge.Instance{
			ID: net.JoinHostPort(address, strconv.Itoa(port)), Address: address, Port: port, State: bridge.Up,
		})
	}
	slices.SortFunc(instances, func(a, b bridge.Instance) int { return strings.Compare(a.ID, b.ID) })
	return instances, nil
}

// missing reports whether DNS has confirmed that there are no records.
func missing(err error) bool {
	var e *net.DNSError
	return errors.As(err, &e) && e.IsNotFound
}
