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

// entry is an instance with its node and its health, the part of it that is of interest.
type entry struct {
	Node struct {
		Name    string `json:"Node"`
		Address string
	}
	Service struct {
		ID      string
		Name    string `json:"Service"`
		Kind    string // empty, but for what belongs to Consul's own mesh
		Address string
		Port    int
		Tags    []string
		Meta    map[string]string
		// TaggedAddresses are what callers of other datacenters, or of one family of addresses, are given in place of Address.
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

// Consul makes these checks itself, where someone has put a node or a service into maintenance mode.
const (
	nodeMaintenance    = "_node_maintenance"
	serviceMaintenance = "_service_maintenance:"
)

// translate leaves out what belongs to Consul's own mesh. The bridge's own instances are known by their own ids, wherever they
// are; one that has come from a dead agent to another is one still.
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
		TLS: strings.EqualFold(e.says("secure"), "true"), State: e.state(), Version: e.says("version"), Owner: e.Service.Meta[ownerKey],
		Shown: bridge.Advert{Service: e.Service.Name, ID: e.id(), Host: e.Service.Address, Port: e.Service.Port, Owner: e.Service.Meta[ownerKey], Besides: e.besides()},
	}
}

// besides is what an entry says that registration does not.
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
		// Consul adds those that are the same.
		if other := e.Service.TaggedAddresses[name]; other != (taggedAddress{e.Service.Address, e.Service.Port}) {
			also = append(also, fmt.Sprintf("tagged address %s %s:%d", name, other.Address, other.Port))
		}
	}
	return strings.Join(also, ", ")
}

// id is unique in the service. Consul's own is unique with its agent only: Spring makes it of name and port, the same ones on
// every machine. Those of bridges begin with their prefix, also where someone has taken the mark away.
func (e entry) id() string {
	if e.Service.Meta[ownerKey] != "" || strings.HasPrefix(e.Service.ID, bridge.IDPrefix) && strings.HasSuffix(e.Service.ID, ":"+e.Service.Name) {
		return strings.TrimSuffix(e.Service.ID, ":"+e.Service.Name)
	}
	return e.Node.Name + "/" + e.Service.ID
}

// says is what a service says of itself in its metadata, or in a tag key=value, as before Consul had metadata.
func (e entry) says(key string) string {
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

// state is as Consul's DNS has it: who has a warning is still called, and so is who has no check.
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

// registration is an instance of the mesh as the agent takes it.
func registration(a bridge.Advert, ttl time.Duration) map[string]any {
	return map[string]any{
		"ID": serviceID(a.Service, a.ID), "Name": a.Service, "Address": a.Host, "Port": a.Port,
		"Meta": map[string]string{ownerKey: a.Owner},
		"Check": map[string]any{
			"CheckID": checkID(a), "Name": "polymesh bridge",
			"Notes": "The bridge to the mesh says that it runs. The instance itself is the mesh's gateway.",
			"TTL":   ttl.String(), "Status": "passing", "DeregisterCriticalServiceAfter": forgetAfter.String(),
		},
	}
}

// serviceID has the service's name in it: with an agent an id is one service, and a name that is given up must not take the new
// one with it.
func serviceID(service, id string) string { return id + ":" + service }

func checkID(a bridge.Advert) string { return fmt.Sprintf("service:%s", serviceID(a.Service, a.ID)) }
