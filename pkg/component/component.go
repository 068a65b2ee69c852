// Package component gives every piece of a node one lifecycle and starts, watches and stops the pieces in the right order.
//
// It owns the order and the states; it knows nothing of what a component does. pkg/command builds the list of components
// for a server and hands it to a Manager. The shape follows k0s (pkg/component/manager).
package component

import "context"

// Component is one piece of a node: the datastore, the API server, the kubelet, an add-on.
//
//	Waiting ──Init──► Starting ──Start, Ready──► Ready ◄──Ready──► NotReady
//	   │                  │                        │                  │
//	   └──────────────────┴──────────Stop──────────┴──────────────────┴──► Stopped
//	                                 └── ends by itself ──► Failed
type Component interface {
	// Name is the name that logs and `polymesh status` show, as the field calls the piece: "kube-apiserver".
	Name() string
	// Init does what can fail before anything runs: files, directories, certificates. It is called once, before any
	// component starts.
	Init(ctx context.Context) error
	// Start returns when the component runs in the background. ctx lives as long as the component may run; Stop ends
	// it earlier.
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
