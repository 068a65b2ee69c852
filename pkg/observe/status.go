package observe

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	nodestatus "polymesh.dev/polymesh/pkg/status"
)

// statusPath is where the store serves its status (observe/server).
const statusPath = "/api/polymesh/v1/status"

const askTime = 5 * time.Second

// status is the used part of the store's status.
type status struct {
	Version    string `json:"version"`
	Components []part `json:"components"`
	// Disk is what the store may take, in bytes.
	Disk int64 `json:"disk"`
}

// part is one part of the store.
type part struct {
	Name    string           `json:"name"`
	State   string           `json:"state"`
	Message string           `json:"message"`
	Numbers map[string]int64 `json:"numbers"`
}

// ask requests the status from the store.
func ask(ctx context.Context, socket string) (*status, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	s := &status{}
	err := nodestatus.Call(ctx, socket, http.MethodGet, statusPath, nil, s)
	if errors.Is(err, nodestatus.ErrNotRunning) {
		return nil, errors.New("not listening yet")
	}
	if err != nil {
		return nil, fmt.Errorf("request the store's status: %w", err)
	}
	return s, nil
}

// failure names the parts that do not work, nil if all do.
func (s *status) failure() error {
	if len(s.Components) == 0 {
		return errors.New("starting")
	}
	var all []string
	for _, p := range s.Components {
		switch p.State {
		case "Ready":
		case "Failed":
			all = append(all, p.Name+": "+p.Message)
		default:
			all = append(all, p.Name+" is not ready")
		}
	}
	if len(all) == 0 {
		return nil
	}
	return errors.New(strings.Join(all, "; "))
}

// notes returns the messages of the parts that work.
func (s *status) notes() []string {
	var notes []string
	for _, p := range s.Components {
		if p.State == "Ready" && p.Message != "" {
			notes = append(notes, p.Name+": "+p.Message)
		}
	}
	return notes
}

// stored lists the numbers of the parts that store something.
var stored = []struct{ part, unit string }{{"metrics", "series"}, {"logs", "lines"}, {"traces", "spans"}}

// summary is one line about what is stored.
func (s *status) summary() string {
	var used int64
	numbers := map[string]map[string]int64{}
	for _, p := range s.Components {
		used += p.Numbers["bytes"]
		numbers[p.Name] = p.Numbers
	}
	var what []string
	for _, w := range stored {
		if n, ok := numbers[w.part][w.unit]; ok {
			what = append(what, fmt.Sprintf("%d %s", n, w.unit))
		}
	}
	return strings.Join(append(what, fmt.Sprintf("%d of %d MiB", used>>20, s.Disk>>20)), ", ")
}
