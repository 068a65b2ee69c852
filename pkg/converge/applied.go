package converge

import (
	"sync"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"polymesh.dev/polymesh/pkg/ssa"
)

// Applied remembers what was applied in this run, by a key of the caller's, so that only what has changed since is applied
// again. The zero value is empty.
type Applied struct {
	mu     sync.Mutex
	prints map[string]string
}

// Note remembers an object as the API server returned it from an apply.
func (a *Applied) Note(key string, live *unstructured.Unstructured, manager string) error {
	print, err := ssa.Fingerprint(live, manager)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.prints == nil {
		a.prints = map[string]string{}
	}
	a.prints[key] = print
	return nil
}

// Holds reports whether a live object is as it was applied. One that was not applied in this run is not.
func (a *Applied) Holds(key string, live *unstructured.Unstructured, manager string) (bool, error) {
	print, err := ssa.Fingerprint(live, manager)
	if err != nil {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.prints[key] == print, nil
}
