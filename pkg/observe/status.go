package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// statusPath is where the store serves its status (observe/server).
const statusPath = "/api/polymesh/v1/status"

const (
	askTime     = 5 * time.Second
	maxResponse = 1 << 20
)

// status is what is used of the store's status.
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
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://store"+statusPath, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, errors.New("not listening yet")
	}
	if err != nil {
		return nil, fmt.Errorf("request the store's status: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("request the store's status: it responds with %s", response.Status)
	}
	s := &status{}
	if err := json.NewDecoder(io.LimitReader(response.Body, maxResponse)).Decode(s); err != nil {
		return nil, fmt.Errorf("read the store's status: %w", err)
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

// notes are what the parts that work have to report.
func (s *status) notes() []string {
	var notes []string
	for _, p := range s.Components {
		if p.State == "Ready" && p.Message != "" {
			notes = append(notes, p.Name+": "+p.Message)
		}
	}
	return notes
}

// stored is what is counted of each part that stores something. Collectors have numbers too, of what they have read.
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
