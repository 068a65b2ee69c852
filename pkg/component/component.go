// Package component gives every piece of a node one lifecycle and starts, watches and stops the pieces in the right order.
//
// It owns the order and the states; it knows nothing of what a component does. pkg/server builds the list of components
// for a server and hands it to a Manager. The shape follows k0s (pkg/component/manager).
package component

import (
	"context"
	"time"
)

// Component is one piece of a node: the datastore, the API server, the kubelet, an add-on.
//
//	Waiting ──Init──► Starting ──Start, Ready──► Ready ◄──Ready──► NotReady
//	   │                  │                        │                  │
//	   └──────────────────┴──────────Stop──────────┴──────────────────┴──► Stopped
//	                                 └── ends by itself ──► Failed
type Component interface {
	// Name is the name that logs and `polymesh status` show, as the field calls the piece: "kube-apiserver".
	Name() string
	// Init checks the configuration. It changes nothing on the machine and reads no file that another component makes: a
	// start that is refused leaves everything as it was. It is called once, before any component starts.
	Init(ctx context.Context) error
	// Start makes what the component needs and returns when it runs in the background. ctx is for the start alone: it ends
	// when the node is told to stop, and Start then gives up. What runs on gets a context from Running, which Stop ends.
	Start(ctx context.Context) error
	// Ready returns nil when the component does its work, and otherwise what it still waits for. It is called again and
	// again, also by two callers at once, and must be cheap.
	Ready(ctx context.Context) error
	// Stop ends the component and returns when it has ended. It may be called in any state, and more than once.
	Stop(ctx context.Context) error
}

// Failing is a component that runs inside this process and cannot be started a second time. When its channel yields an
// error the whole node stops and exits with it: the service manager starts a fresh process. Child processes and
// controllers are not Failing; they are restarted, or try again, on their own.
type Failing interface {
	Failed() <-chan error
}

// Outlived is a Failing component without which the others are still of use for a while: without a kubelet or a proxy, the
// API server answers, and an administrator can look, drain and mend. The node stops that much later than it failed.
type Outlived interface {
	Failing
	OutlivedFor() time.Duration
}

// Process is a component with a process of its own.
type Process interface {
	// PID is the process id, 0 while there is none.
	PID() int
}

// Noted is a component that can have something to say although it is ready: what a user should know of and it does not
// change itself. Note returns an empty text for nothing; like Ready it must be cheap.
type Noted interface {
	Note(ctx context.Context) string
}

// Versioned is a component that knows the version of the program behind it.
type Versioned interface {
	Version() string
}

// Running returns the context for what Start leaves running, with the values of Start's own. It ends when Stop calls cancel.
func Running(start context.Context) (ctx context.Context, cancel context.CancelFunc) {
	return context.WithCancel(context.WithoutCancel(start))
}
