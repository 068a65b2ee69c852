// Package document has the forms of what the store keeps of the cluster's objects: package cluster writes them as lines of logs, package page
// reads them, at any later time. A field is only ever added: documents of an earlier version are in the store.
package document

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The labels "job" of the entries. Others cannot write them (package loki).
const (
	Objects  = "objects"
	Events   = "events" // Kubernetes' events, and marks
	Rollouts = "rollouts"
)

// Sources of entries with Events, in their metadata "source". Only marks have Polymesh: users can write events of Kubernetes with any reason.
const (
	Polymesh   = "polymesh"
	Kubernetes = "kubernetes"
)

// Moment is a time that is text in seconds, as Kubernetes' own are.
type Moment struct{ time.Time }

// At is a time as a Moment.
func At(t time.Time) Moment { return Moment{t} }

// MarshalJSON implements json.Marshaler.
func (m Moment) MarshalJSON() ([]byte, error) { return m.UTC().Truncate(time.Second).MarshalJSON() }

// Workload is a workload with its pods.
type Workload struct {
	Kind       string      `json:"kind"`
	Namespace  string      `json:"namespace"`
	Name       string      `json:"name"`
	UID        string      `json:"uid,omitempty"`
	Created    Moment      `json:"created,omitzero"`
	Deleted    Moment      `json:"deleted,omitzero"`
	Generation int64       `json:"generation,omitempty"`
	Revision   string      `json:"revision,omitempty"`
	Replicas   int32       `json:"replicas"`
	Ready      int32       `json:"ready"`
	Updated    int32       `json:"updated"`
	Available  int32       `json:"available"`
	Paused     bool        `json:"paused,omitempty"`
	Schedule   string      `json:"schedule,omitempty"`
	Conditions []Condition `json:"conditions,omitempty"`
	Containers []Container `json:"containers,omitempty"`
	Pods       []Pod       `json:"pods,omitempty"`
	More       int         `json:"more,omitempty"` // pods for which there was no room
}

// Condition is a condition of an object.
type Condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Since   Moment `json:"since,omitzero"`
}

// Container is a container of a workload's template.
type Container struct {
	Name     string            `json:"name"`
	Image    string            `json:"image"`
	Requests map[string]string `json:"requests,omitempty"`
	Limits   map[string]string `json:"limits,omitempty"`
}

// Pod is a pod of a workload.
type Pod struct {
	Name       string  `json:"name"`
	UID        string  `json:"uid"`
	Node       string  `json:"node,omitempty"`
	IP         string  `json:"ip,omitempty"`
	Phase      string  `json:"phase"`
	Reason     string  `json:"reason,omitempty"`
	Message    string  `json:"message,omitempty"`
	Created    Moment  `json:"created,omitzero"`
	Started    Moment  `json:"started,omitzero"`
	Deleting   Moment  `json:"deleting,omitzero"`
	Deleted    bool    `json:"deleted,omitempty"` // it is gone
	Owner      string  `json:"owner,omitempty"`
	Template   string  `json:"template,omitempty"`
	Revision   string  `json:"revision,omitempty"`
	Ready      bool    `json:"ready"`
	Containers []State `json:"containers,omitempty"`
}

// State is the state of a container.
type State struct {
	Name     string `json:"name"`
	Image    string `json:"image,omitempty"`
	Init     bool   `json:"init,omitempty"`
	Ready    bool   `json:"ready"`
	Restarts int32  `json:"restarts"`
	State    string `json:"state"` // running, waiting or terminated
	Reason   string `json:"reason,omitempty"`
	Message  string `json:"message,omitempty"`
	ExitCode int32  `json:"exitCode,omitempty"`
	Since    Moment `json:"since,omitzero"`
	Last     *End   `json:"last,omitempty"`
}

// End is how a container ended before it was started again.
type End struct {
	Reason   string `json:"reason,omitempty"`
	ExitCode int32  `json:"exitCode"`
	Finished Moment `json:"finished,omitzero"`
}

// Rollout is what is shown of a rollout's state, in the form in which `polymesh rollout` records it (pkg/workflow/rollout in the main module).
type Rollout struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	Image     string `json:"image"`
	Previous  string `json:"previous"`
	Plan      Plan   `json:"plan"`
	Started   Moment `json:"started,omitzero"`
	Phase     string `json:"phase"`
	Step      int    `json:"step"`
	Weight    int    `json:"weight"`
	Reason    string `json:"reason,omitempty"`
	Done      []Step `json:"done,omitempty"`
	Ended     Moment `json:"ended,omitzero"`
	Final     string `json:"final,omitempty"`
}

// Over reports whether the rollout has ended.
func (r *Rollout) Over() bool { return !r.Ended.IsZero() }

// Plan is what a rollout does, and what ends it.
type Plan struct {
	Steps        []int           `json:"steps"`
	Interval     metav1.Duration `json:"interval"`
	MaxErrorRate float64         `json:"maxErrorRate"`
	MaxP99       metav1.Duration `json:"maxP99"`
	MinRequests  int             `json:"minRequests"`
	Timeout      metav1.Duration `json:"timeout"`
}

// Step is a step that was done.
type Step struct {
	Weight int     `json:"weight"`
	Canary Measure `json:"canary"`
	Stable Measure `json:"stable"`
}

// Measure is what was measured in a step.
type Measure struct {
	Requests  int             `json:"requests"`
	ErrorRate float64         `json:"errorRate"`
	P99       metav1.Duration `json:"p99"`
	Timed     int             `json:"timed"`
}
