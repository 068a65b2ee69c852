// Package findings asks the server what is wrong in the cluster and keeps the answers in the log store, so that the page can show what was wrong at any
// time, even when the cluster is gone. The answers come from the engine that `polymesh deploy` uses for its explanations (pkg/diagnose in the main module).
//
// It owns the job "findings": every minute, and after each change, it writes one entry for the survey and one for each of its findings, all
// with the same time. Package page reads them. Package server creates the Collector and runs it.
package findings

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
)

// Job is the label "job" of the entries. Others cannot write it (package loki).
const Job = "findings"

// KindSurvey is the metadata "kind" of a survey's entry. A finding's entry has the kind of its object.
const KindSurvey = "Survey"

// Every is the longest time between two written surveys while the server answers.
const Every = time.Minute

const (
	// path is on the server's socket for root (pkg/server in the main module).
	path = "/findings"
	// interval is the time between two surveys. The server makes no more.
	interval    = 15 * time.Second
	requestTime = 20 * time.Second
	// silence is how long the server may be silent before it is a problem: it may be starting.
	silence = 2 * time.Minute
)

// Limits of an answer. The server's own limits are smaller; any user can choose the texts.
const (
	maxAnswer   = 1 << 20
	maxFindings = 200
	maxName     = 253
	maxText     = 4 << 10
)

// Finding is what is wrong with an object: the line of an entry.
type Finding struct {
	Reason string `json:"reason"`
	// Kind and Name identify a node, a namespace, or a workload in Namespace. The kind is Cluster, without a name, if it is about the cluster's servers.
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	// Message says what happened, and Advice what to do.
	Message string    `json:"message"`
	Advice  string    `json:"advice,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	// Bad means that it does not work at all.
	Bad bool `json:"bad,omitempty"`
	// Ready is how many of a workload's Replicas are ready.
	Ready    int `json:"ready,omitempty"`
	Replicas int `json:"replicas,omitempty"`
	// Checked is when this was last found, if there was no time to look again.
	Checked time.Time `json:"checked,omitzero"`
}

// KindNamespace is the kind of a finding about a namespace, which is its Namespace and its Name.
const KindNamespace = "Namespace"

// Survey is the server's answer: what is wrong at a time.
type Survey struct {
	Findings []Finding `json:"findings"`
	// More is how many more workloads may have problems.
	More int `json:"more"`
}

// Summary is the line of a survey's entry.
type Summary struct {
	Findings int `json:"findings"`
	// More is how many more workloads may have problems.
	More int `json:"more,omitempty"`
}

// Store keeps entries.
type Store interface {
	Append([]logstore.Entry) error
}

// Options of a Collector.
type Options struct {
	// Socket is the server's socket.
	Socket string
	Store  Store
	Log    *slog.Logger
}

// Collector stores what the server finds.
type Collector struct {
	opts   Options
	client *http.Client

	// Used by Run alone.
	written time.Time
	last    string

	mu       sync.Mutex
	answered time.Time
	failure  string
	unsaved  string
	found    int64
}

// New returns a Collector, which Run starts.
func New(o Options) *Collector {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", o.Socket)
	}
	return &Collector{opts: o, client: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}, answered: time.Now()}
}

// Run asks until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		c.round(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Problem returns why findings are not known or not stored, empty if they are.
func (c *Collector) Problem() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != "" && time.Since(c.answered) > silence {
		return c.failure
	}
	return c.unsaved
}

// Numbers returns the number of findings.
func (c *Collector) Numbers() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return map[string]int64{"findings": c.found}
}

// round asks once and writes what has changed.
func (c *Collector) round(ctx context.Context) {
	s, err := c.ask(ctx)
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	c.mu.Lock()
	if err != nil {
		c.failure = err.Error()
	} else {
		c.answered, c.failure, c.found = now, "", int64(len(s.Findings))
	}
	c.mu.Unlock()
	if err != nil {
		c.opts.Log.Debug("what is wrong in the cluster is not known", "err", err)
		// The next answer is written even if nothing has changed.
		c.last = ""
		return
	}
	entries := s.Entries(now)
	text := lines(entries)
	if text == c.last && now.Sub(c.written) < Every {
		return
	}
	problem := ""
	if err := c.opts.Store.Append(entries); err != nil {
		problem = fmt.Sprintf("what is wrong in the cluster is not written: %v", err)
	} else {
		c.last, c.written = text, now
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if problem != "" && problem != c.unsaved {
		c.opts.Log.Warn(problem)
	}
	c.unsaved = problem
}

func lines(entries []logstore.Entry) string {
	var b strings.Builder
	for _, e := range entries {
		b.WriteString(e.Line + "\n")
	}
	return b.String()
}

// ask requests a survey.
func (c *Collector) ask(ctx context.Context) (*Survey, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://server"+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask the server what is wrong in the cluster: %w", err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask the server what is wrong in the cluster: %w", err)
	case len(text) > maxAnswer:
		return nil, errors.New("the server's answer about what is wrong in the cluster is too long")
	case response.StatusCode != http.StatusOK:
		var refused struct{ Message string }
		_ = json.Unmarshal(text, &refused) // without a message, the status is enough
		return nil, fmt.Errorf("the server does not know what is wrong in the cluster: %s %s", response.Status, excerpt.Of(refused.Message, maxText))
	}
	s := &Survey{}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("read the server's answer about what is wrong in the cluster: %w", err)
	}
	if s.More = max(s.More, 0); len(s.Findings) > maxFindings {
		s.More += len(s.Findings) - maxFindings
		s.Findings = s.Findings[:maxFindings]
	}
	for i := range s.Findings {
		s.Findings[i].bound()
	}
	return s, nil
}

func (f *Finding) bound() {
	for _, name := range []*string{&f.Reason, &f.Kind, &f.Namespace, &f.Name, &f.Pod, &f.Container} {
		*name = excerpt.Of(*name, maxName)
	}
	f.Message, f.Advice = excerpt.Of(f.Message, maxText), excerpt.Of(f.Advice, maxText)
	f.Ready, f.Replicas = max(f.Ready, 0), max(f.Replicas, 0)
}

// Entries returns the entries of a survey.
func (s *Survey) Entries(at time.Time) []logstore.Entry {
	job := logstore.Field{Name: "job", Value: Job}
	entries := []logstore.Entry{{
		Time: at, Labels: []logstore.Field{job}, Line: encode(Summary{len(s.Findings), s.More}), Metadata: []logstore.Field{{Name: "kind", Value: KindSurvey}},
	}}
	for _, f := range s.Findings {
		labels := []logstore.Field{job}
		switch {
		case f.Kind == KindNamespace:
			labels = append(labels, logstore.Field{Name: "namespace", Value: f.Namespace})
		case f.Namespace != "":
			labels = append(labels, logstore.Field{Name: "namespace", Value: f.Namespace}, logstore.Field{Name: "workload", Value: f.Name})
		case f.Kind == "Node":
			labels = append(labels, logstore.Field{Name: "node", Value: f.Name})
		}
		entries = append(entries, logstore.Entry{
			Time: at, Labels: labels, Line: encode(f),
			Metadata: []logstore.Field{{Name: "kind", Value: f.Kind}, {Name: "name", Value: f.Name}, {Name: "reason", Value: f.Reason}},
		})
	}
	return entries
}

func encode(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		// Everything in it was read from JSON, so it can be written as JSON.
		return ""
	}
	return string(text)
}
