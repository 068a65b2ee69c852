package bridge

import (
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Registry is where an old system's services find each other.
type Registry interface {
	// Services lists every service. An error means that the registry did not answer: then nothing is known, and nothing
	// is taken away.
	Services(ctx context.Context) ([]Service, error)
	// String is its address, without secrets.
	String() string
}

// Advertiser is a registry that services of the mesh can be put into.
type Advertiser interface {
	Registry
	// Register puts an instance into the registry, or sets it right.
	Register(ctx context.Context, a Advert) error
	// Renew tells the registry that an instance is still there. It reports false if the registry does not know it.
	Renew(ctx context.Context, a Advert) (known bool, err error)
	// Withdraw takes an instance out. One that is not there is no error.
	Withdraw(ctx context.Context, service, id string) error
	// RenewEvery is how often the registry wants to hear of an instance.
	RenewEvery() time.Duration
}

// Holder is a registry that can hide an instance from callers while it stays registered.
type Holder interface {
	Hold(ctx context.Context, service, id string) error
	Release(ctx context.Context, service, id string) error
}

// Service is a name in a registry, with those who answer to it.
type Service struct {
	Name      string
	Instances []Instance
}

// State is what a registry says of an instance.
type State string

const (
	Up           State = "UP"
	OutOfService State = "OUT_OF_SERVICE" // hidden from callers by someone's wish
	Down         State = "DOWN"           // anything else: starting, failing, unknown
)

// Instance is one program that answers to a service's name.
type Instance struct {
	ID      string // unique within its service
	Address string // an IP address, or a host name
	Port    int
	// TLS says that the port speaks TLS, and that there is none which does not.
	TLS   bool
	State State
	// Renewed is when the instance was last heard of, by the registry's clock; zero where the registry does not say.
	Renewed time.Time
	// Version becomes the label of that name, for subsets. It may be empty.
	Version string
	// Owner is the bridge that has put the instance into the registry; empty for the old system's own.
	Owner string
	// Shown is what the registry tells callers of the instance, in the form in which a bridge puts one there. It is filled in for
	// instances that have an owner, or the id of one. Anyone who may write to the registry can change it.
	Shown Advert
}

// IDPrefix begins the ids of adverts.
const IDPrefix = "polymesh-"

// Advert is a service of the mesh as callers outside are to see it.
type Advert struct {
	Service string // the name in the registry
	ID      string
	Host    string // what callers dial, and say in the Host header: a name, or Address
	Address string // an IP address
	Port    int
	Owner   string
	// Besides is what a registry shows beyond what a bridge registers, such as metadata that tells callers where to go. A bridge
	// registers none.
	Besides string
}

// label is how a registry's name is written in host names and labels. Registries take names that DNS does not.
func label(name string) (string, error) {
	l := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	if len(validation.IsDNS1123Label(l)) > 0 {
		return "", fmt.Errorf("%q cannot be part of a host name: only letters, digits and - may be in it, and _, which becomes -", name)
	}
	return l, nil
}
