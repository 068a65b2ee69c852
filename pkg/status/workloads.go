package status

import "time"

// Workloads is what is wrong with the cluster's workloads, and with namespaces that are being deleted, as the diagnosis of package diagnose has found.
type Workloads struct {
	// Troubled is how many have problems.
	Troubled int `json:"troubled"`
	// Problems are those of the first of them, the worst first.
	Problems []Problem `json:"problems,omitempty"`
	// Unknown is why it is not known; empty if it is.
	Unknown string `json:"unknown,omitempty"`
}

// MaxProblems is how many problems a report has at most.
const MaxProblems = 20

// Problem is what is wrong with a workload or a namespace. Names and texts can be anything.
type Problem struct {
	Kind string `json:"kind"`
	// Namespace is empty for a namespace itself.
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	// Reason is in one word what Message tells; Advice is what to do.
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Advice  string    `json:"advice,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	// Checked is when this was last found, if there was no time to look again.
	Checked time.Time `json:"checked,omitzero"`
	// Ready is how many of its Replicas are ready.
	Ready    int32 `json:"ready"`
	Replicas int32 `json:"replicas"`
}
