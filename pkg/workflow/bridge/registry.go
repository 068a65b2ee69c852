package bridge

import (
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Registry is the service registry of an old system.
type Registry interface {
	// Services lists every service. An error means that the registry did not respond: then its contents are unknown, and nothing
	// is removed.
	Services(ctx context.Context) ([]Service, error)
	// String returns its address, without secrets.
	String() string
}

// Advertiser is a registry that services of the mesh can be added to.
type Advertiser interface {
	Registry
	// Register adds an instance to the registry, or updates it.
	Register(ctx context.Context, a Advert) error
	// Renew sends a heartbeat for an instance. It returns false if the registry does not have the instance.
	Renew(ctx context.Context, a Advert) (known bool, err error)
	// Withdraw removes an instance. It is not an error if the instance does not exist.
	Withdraw(ctx context.Context, service, id string) error
	// RenewEvery is the registry's heartbeat interval.
	RenewEvery() time.Duration
}

// Holder is a registry that can hide an instance from callers while it stays registered.
type Holder interface {
	Hold(ctx context.Context, service, id string) error
	Release(ctx context.Context, service, id string) error
}

// Service is a name in a registry, with its instances.
type Service struct {
	Name      string
	Instances []Instance
}

// State is the state of an instance in the registry.
type State string

const (
	Up           State = "UP"
	OutOfService State = "OUT_OF_SERVICE" // hidden from callers on request
	Down         State = "DOWN"           // anything else: starting, failing, unknown
)

// Instance is one running instance of a service.
type Instance struct {
	ID      string // unique within its service
	Address string // an IP address, or a host name
	Port    int
	// TLS is set if the port requires TLS and the instance has no port without it.
	TLS   bool
	State State
	// Renewed is the time of the last heartbeat, by the registry's clock; zero if the registry does not report it.
	Renewed time.Time
	// Version becomes the label of that name, for subsets. It may be empty.
	Version string
	// Owner is the bridge that registered the instance; empty for the old system's own.
	Owner string
	// Shown is how the registry presents the instance to callers, in the form of an advert. It is set for
	// instances with an owner, or the id of one. Anyone with write access to the registry can change it.
	Shown Advert
}

// IDPrefix is the prefix of advert ids.
const IDPrefix = "polymesh-"

// Advert is a service of the mesh as presented to callers outside.
type Advert struct {
	Service string // the name in the registry
	ID      string
	Host    string // what callers connect to and send in the Host header: a name, or Address
	Address string // an IP address
	Port    int
	Owner   string
	// Besides describes what a registry shows in addition to the registered fields, such as metadata that redirects callers. A bridge
	// registers none.
	Besides string
}

// label converts a registry's name for use in host names and labels. Registries accept names that DNS does not.
func label(name string) (string, error) {
	l := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	if len(validation.IsDNS1123Label(l)) > 0 {
		return "", fmt.Errorf("%q cannot be part of a host name: it may only contain letters, digits, - and _ (which becomes -)", name)
	}
	return l, nil
}
