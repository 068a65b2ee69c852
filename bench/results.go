package main

import (
	"slices"
	"sync"
)

// figureID names a figure, setting a kind of node.
type (
	figureID string
	setting  string
)

const (
	bareIdle  setting = "bare"
	meshIdle  setting = "mesh"
	smallBare setting = "small bare"
	smallMesh setting = "small mesh"
)

const (
	fileSize   figureID = "file size"
	loadBefore figureID = "load before"

	bareAPI, bareNode, bareAll                figureID = "bare: API", "bare: node", "bare: all"
	bareAPIAgain, bareNodeAgain, bareAllAgain figureID = "bare again: API", "bare again: node", "bare again: all"

	meshAPI, meshNode, meshIstiod, meshIngress, meshAll figureID = "mesh: API", "mesh: node", "mesh: istiod", "mesh: ingress", "mesh: all"
	meshAPIAgain, meshNodeAgain, meshAllAgain           figureID = "mesh again: API", "mesh again: node", "mesh again: all"

	plainOne, plainMany, plainEach       figureID = "plain: one", "plain: many", "plain: each"
	sidecarOne, sidecarMany, sidecarEach figureID = "sidecar: one", "sidecar: many", "sidecar: each"
)

// results collects the values of all runs.
type results struct {
	mu        sync.Mutex
	values    map[figureID][]float64
	processes map[setting][][]process // of each run
	verdicts  map[setting][]string
}

func newResults() *results {
	return &results{values: map[figureID][]float64{}, processes: map[setting][][]process{}, verdicts: map[setting][]string{}}
}

func (r *results) add(id figureID, value float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.values[id] = append(r.values[id], value)
}

func (r *results) addProcesses(id setting, found []process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.processes[id] = append(r.processes[id], found)
}

func (r *results) verdict(id setting, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.verdicts[id] = append(r.verdicts[id], text)
}

// median is the middle one of the values, or between the two in the middle. There must be some.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
