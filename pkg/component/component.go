// Package component gives every part of a node one lifecycle, and starts, watches and stops the parts in the right order.
//
// It owns the order and the states; it knows nothing about a component's work. pkg/server builds the list of components
// for a server and passes it to a Manager. The design follows k0s (pkg/component/manager).
package component

import (
	"context"
	"time"
)

// Component is one part of a node: the datastore, the API server, the kubelet, an add-on.
//
//	Waiting ──Init──► Starting ──Start, Ready──► Ready ◄──Ready──► NotReady
//	   │                  │                        │                  │
//	   └──────────────────┴──────────Stop──────────┴──────────────────┴──► Stopped
//	                                 └── ends by itself ──► Failed
type Component interface {
	// Name is the name in logs and `polymesh status`, as commonly used: "kube-apiserver".
	Name() string
	// Init checks the configuration. It changes nothing on the machine and reads no files of other components: a
	// refused start leaves everything unchanged. It is called once, before any component starts.
	Init(ctx context.Context) error
	// Start starts the component and returns when it runs in the background. ctx is only for the start itself: when it ends,
	// because the node is stopping, Start gives up. The running part uses a context from Running, which Stop ends.
	Start(ctx context.Context) error
	// Ready returns nil when the component works, and otherwise what it is waiting for. It is called repeatedly,
	// also concurrently, and must be cheap.
	Ready(ctx context.Context) error
	// Stop ends the component and returns when it has ended. It may be called in any state, and more than once.
	Stop(ctx context.Context) error
}

// Failing is a component that runs inside this process and cannot be started a second time. When its channel yields an
// error the whole node stops and exits with it: the service manager starts a new process. Child processes and
// controllers are not Failing; they are restarted, or retry, on their own.
type Failing interface {
	Failed() <-chan error
}

// Outlived is a Failing component without which the others remain useful for a while: without a kubelet or a proxy, the
// API server still works, and an administrator can inspect, drain and repair. The node stops this long after the failure.
type Outlived interface {
	Failing
	OutlivedFor() time.Duration
}

// Process is a component with its own process.
type Process interface {
	// PID is the process id, 0 if it is not running.
	PID() int
}

// Noted is a component that may have warnings for the user although it is ready. Each is a text of its own, because others choose parts
// of it: names of nodes, answers of registries. Like Ready, Notes must be cheap.
type Noted interface {
	Notes(ctx context.Context) []string
}

// Present returns the texts that exist and are not empty: a component's Notes, of texts that its background sets.
func Present(texts ...*string) []string {
	var present []string
	for _, text := range texts {
		if text != nil && *text != "" {
			present = append(present, *text)
		}
	}
	return present
}

// Summarized is a component with a line for `polymesh status` while it is ready: numbers, which need no action.
type Summarized interface {
	Summary() string
}

// Versioned is a component that knows the version of its program.
type Versioned interface {
	Version() string
}

// Running returns the context for parts that Start leaves running, with the values of Start's own. It ends when Stop calls cancel.
func Running(start context.Context) (ctx context.Context, cancel context.CancelFunc) {
	return context.WithCancel(context.WithoutCancel(start))
}
