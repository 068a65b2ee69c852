package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
)

// figureID identifies a figure, setting a kind of node.
type (
	figureID string
	setting  string
)

const (
	bareIdle  setting = "bare"
	meshIdle  setting = "mesh"
	agentIdle setting = "agent"
	storeIdle setting = "store"
	smallBare setting = "small bare"
	smallMesh setting = "small mesh"
)

const (
	fileSize figureID = "file size"

	bareAPI, bareNode, bareAll                figureID = "bare: API", "bare: node", "bare: all"
	bareAPIAgain, bareNodeAgain, bareAllAgain figureID = "bare again: API", "bare again: node", "bare again: all"

	agentReady, agentAll           figureID = "agent: node", "agent: all"
	agentReadyAgain, agentAllAgain figureID = "agent again: node", "agent again: all"

	meshAPI, meshNode, meshIstiod, meshIngress, meshAll figureID = "mesh: API", "mesh: node", "mesh: istiod", "mesh: ingress", "mesh: all"
	meshAPIAgain, meshNodeAgain, meshAllAgain           figureID = "mesh again: API", "mesh again: node", "mesh again: all"

	plainOne, plainMany, plainEach       figureID = "plain: one", "plain: many", "plain: each"
	sidecarOne, sidecarMany, sidecarEach figureID = "sidecar: one", "sidecar: many", "sidecar: each"
)

// results collects the values of all runs of a part, or of all parts.
type results struct {
	mu        sync.Mutex
	Values    map[figureID][]float64
	Processes map[setting][][]process // of each run
	Verdicts  map[setting][]string
}

func newResults() *results {
	return &results{Values: map[figureID][]float64{}, Processes: map[setting][][]process{}, Verdicts: map[setting][]string{}}
}

func (r *results) add(id figureID, value float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Values[id] = append(r.Values[id], value)
}

// last returns the value of this run, which must exist.
func (r *results) last(id figureID) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Values[id][len(r.Values[id])-1]
}

func (r *results) addProcesses(id setting, found []process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Processes[id] = append(r.Processes[id], found)
}

func (r *results) verdict(id setting, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Verdicts[id] = append(r.Verdicts[id], text)
}

// addAll adds the results of a part. Parts do not share figures.
func (r *results) addAll(part *results) {
	maps.Copy(r.Values, part.Values)
	maps.Copy(r.Processes, part.Processes)
	maps.Copy(r.Verdicts, part.Verdicts)
}

// record is the results of the latest runs of a part, and how they were made.
type record struct {
	Machine  machine
	Settings string
	Runs     int
	Load     []float64 // of the machine, before each run
	Results  *results
}

// records are stored in a file, by part: parts can be measured separately.
type records map[string]*record

func readRecords(path string) (records, error) {
	kept := records{}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return kept, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, fmt.Errorf("read the earlier results in %s: %w", path, err)
	}
	return kept, nil
}

func (r records) write(path string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// median returns the middle value, or the mean of the two in the middle. There must be at least one.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
