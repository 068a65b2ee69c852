package consul

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

// entry is an instance with its node and its health, reduced to the fields in use.
type entry struct {
	Node struct {
		Name    string `json:"Node"`
		Address string
	}
	Service struct {
		ID      string
		Name    string `json:"Service"`
		Kind    string // empty, except for parts of Consul's own mesh
		Address string
		Port    int
		Tags    []string
		Meta    map[string]string
		// TaggedAddresses replace Address for callers in other datacenters, or of one address family.
		TaggedAddresses map[string]taggedAddress
	}
	Checks []struct {
		CheckID string
		Status  string
	}
}

type taggedAddress struct {
	Address string
	Port    int
}

// Consul creates these checks itself for a node or service in maintenance mode.
const (
	nodeMaintenance    = "_node_maintenance"
	serviceMaintenance = "_service_maintenance:"
)

// translate skips the parts of Consul's own mesh. The bridge's own instances are identified by their own ids, on any
// agent; one that has moved from a dead agent to another is counted once.
func translate(entries []entry) []bridge.Instance {
	rank := []bridge.State{bridge.Up, bridge.OutOfService, bridge.Down}
	var instances []bridge.Instance
	for _, e := range entries {
		if e.Service.Kind == "" {
			instances = append(instances, e.translate())
		}
	}
	slices.SortStableFunc(instances, func(a, b bridge.Instance) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), slices.Index(rank, a.State)-slices.Index(rank, b.State))
	})
	return slices.CompactFunc(instances, func(a, b bridge.Instance) bool { return a.ID == b.ID })
}

func (e entry) translate() bridge.Instance {
	return bridge.Instance{
		ID: e.id(), Address: cmp.Or(e.Service.Address, e.Node.Address), Port: e.Service.Port,
		TLS: strings.EqualFold(e.metaValue("secure"), "true"), State: e.state(), Version: e.metaValue("version"), Owner: e.Service.Meta[ownerKey],
		Shown: bridge.Advert{Service: e.Service.Name, ID: e.id(), Host: e.Service.Address, Port: e.Service.Port, Owner: e.Service.Meta[ownerKey], Besides: e.besides()},
	}
}

// besides describes the fields of an entry that a registration does not set.
func (e entry) besides() string {
	var also []string
	for _, tag := range e.Service.Tags {
		also = append(also, "tag "+tag)
	}
	for _, key := range slices.Sorted(maps.Keys(e.Service.Meta)) {
		if key != ownerKey {
			also = append(also, "metadata "+key)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(e.Service.TaggedAddresses)) {
		// Consul adds those that are equal to Address.
		if other := e.Service.TaggedAddresses[name]; other != (taggedAddress{e.Service.Address, e.Service.Port}) {
			also = append(also, fmt.Sprintf("tagged address %s %s:%d", name, other.Address, other.Port))
		}
	}
	return strings.Join(also, ", ")
}

// id returns an id that is unique in the service. Consul's own is only unique per agent: Spring derives it from name and port, the
// same on every machine. A bridge's instances are recognized by the id prefix, even if the mark was removed.
func (e entry) id() string {
	if e.Service.Meta[ownerKey] != "" || strings.HasPrefix(e.Service.ID, bridge.IDPrefix) && strings.HasSuffix(e.Service.ID, ":"+e.Service.Name) {
		return strings.TrimSuffix(e.Service.ID, ":"+e.Service.Name)
	}
	return e.Node.Name + "/" + e.Service.ID
}

// metaValue returns a value from the service's metadata, or from a tag key=value, as used before Consul had metadata.
func (e entry) metaValue(key string) string {
	if value, ok := e.Service.Meta[key]; ok {
		return value
	}
	for _, tag := range e.Service.Tags {
		if k, value, ok := strings.Cut(tag, "="); ok && k == key {
			return value
		}
	}
	return ""
}

// state follows Consul's DNS: instances with a warning or without checks are still called.
func (e entry) state() bridge.State {
	state := bridge.Up
	for _, c := range e.Checks {
		switch {
		case c.CheckID == nodeMaintenance || strings.HasPrefix(c.CheckID, serviceMaintenance):
			return bridge.OutOfService
		case c.Status != "passing" && c.Status != "warning":
			state = bridge.Down
		}
	}
	return state
}

// registration encodes an instance of the mesh for the agent's API.
func registration(a bridge.Advert, ttl time.Duration) map[string]any {
	return map[string]any{
		"ID": serviceID(a.Service, a.ID), "Name": a.Service, "Address": a.Host, "Port": a.Port,
		"Meta": map[string]string{ownerKey: a.Owner},
		"Check": map[string]any{
			"CheckID": checkID(a), "Name": "polymesh bridge",
			"Notes": "Passed by the bridge to the mesh while it runs. The instance itself is the mesh's gateway.",
			"TTL":   ttl.String(), "Status": "passing", "DeregisterCriticalServiceAfter": forgetAfter.String(),
		},
	}
}

// serviceID contains the service's name: an id is unique per agent, and withdrawing an old name must not remove the new
// one.
func serviceID(service, id string) string { return id + ":" + service }

func checkID(a bridge.Advert) string { return fmt.Sprintf("service:%s", serviceID(a.Service, a.ID)) }
