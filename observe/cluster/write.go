package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	// tick is how often due entries are written.
	tick = time.Second
	// goneAfter is how long the API server must not answer before a mark is written.
	goneAfter = 10 * time.Second
	// writeRetry is the pause before documents that the store did not take are written again.
	writeRetry = time.Minute
	// maxRecalled bounds the entries that are read at the start.
	maxRecalled = 20_000
)

// write writes entries until ctx ends.
func (c *Cluster) write(ctx context.Context) {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			c.flush(time.Now())
			return
		case <-ticker.C:
			c.flush(time.Now())
		}
	}
}

// flush writes the entries that are due.
func (c *Cluster) flush(now time.Time) {
	entries, documents := c.due(now)
	if len(entries) == 0 {
		return
	}
	err := c.opts.Store.Append(entries)
	var rejected *rowstore.RejectedError
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.unsaved = ""
		return
	case errors.As(err, &rejected):
		c.dropped += int64(rejected.Rows)
	default:
		c.dropped += int64(len(entries))
		if documents > 0 {
			c.documents.snapshot = now.Add(writeRetry - snapshotEvery)
		}
	}
	text := excerpt.Of(err.Error(), maxMessage)
	if c.unsaved != text {
		c.log.Warn("what happens in the cluster is not written", "entries", len(entries), "err", text)
	}
	c.unsaved = text
}

// due returns the entries to write, and how many of them are documents.
func (c *Cluster) due(now time.Time) (entries []logstore.Entry, documents int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tellConnection(now)
	c.events.tellLeftOut(now)
	c.configsKnown()
	if !c.settled(now) && c.conn.reachable {
		// The queue is about objects that are still being listed.
		return nil, 0
	}
	c.reown()
	entries = c.dueDocuments(now)
	documents = len(entries)
	entries = append(entries, c.dueRollouts(now)...)
	return append(entries, c.dueMarks(now)...), documents
}

// tellConnection marks that the API server has stopped or started to answer.
func (c *Cluster) tellConnection(now time.Time) {
	subject := ref{kind: "Cluster"}
	switch {
	case !c.conn.reachable && !c.conn.since.IsZero() && !c.conn.told && now.Sub(c.conn.since) >= goneAfter:
		c.conn.told = true
		c.mark(subject, ClusterGone, warning, "the API server does not answer", c.conn.since, identify(ClusterGone, c.conn.since.Format(time.RFC3339Nano)))
	case c.conn.reachable && c.conn.told:
		c.conn.told = false
		c.mark(subject, ClusterBack, normal, "the API server answers again", c.conn.since, identify(ClusterBack, c.conn.since.Format(time.RFC3339Nano)))
	}
}

// recall reads what the store knows about the cluster, so that nothing is written twice and deleted pods still have a workload.
func (c *Cluster) recall(ctx context.Context, now time.Time) error {
	store := c.opts.Store
	all := logstore.Matcher{Name: "job", Type: logstore.Regexp, Value: document.Objects + "|" + document.Events + "|" + document.Rollouts}
	var last time.Time
	err := store.Select(ctx, logstore.Selector{Matchers: []logstore.Matcher{all}, End: now, Limit: 1, Newest: true}, func(e logstore.Entry) bool {
		last = e.Time
		return true
	})
	if err != nil || last.IsZero() {
		return err
	}
	written := map[uint64]bool{}
	events := logstore.Selector{Matchers: []logstore.Matcher{{Name: "job", Value: document.Events}}, Start: now.Add(-memory), Limit: maxRecalled, Newest: true}
	err = store.Select(ctx, events, func(e logstore.Entry) bool {
		if id, err := strconv.ParseUint(logstore.Value(e.Metadata, "id"), 16, 64); err == nil {
			written[id] = true
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("read the events of the last %s: %w", memory, err)
	}
	seen := map[key]bool{}
	c.mu.Lock()
	c.marks.written = written
	c.marks.since = last
	c.mu.Unlock()
	objects := logstore.Selector{
		Matchers: []logstore.Matcher{{Name: "job", Value: document.Objects}}, Start: last.Add(-snapshotEvery - time.Minute), Limit: maxRecalled, Newest: true,
	}
	err = store.Select(ctx, objects, func(e logstore.Entry) bool {
		var doc struct {
			Kind, Namespace, Name, Revision string
			Deleted                         time.Time
			Containers                      []struct{ Name, Image string }
			Pods                            []struct{ Name, UID, Node string }
		}
		if json.Unmarshal([]byte(e.Line), &doc) != nil || len(doc.Containers) == 0 {
			return true
		}
		k := key{doc.Kind, doc.Namespace, doc.Name}
		newest := !seen[k]
		seen[k] = true
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, p := range doc.Pods {
			if c.owners.gone[doc.Namespace+"/"+p.Name] == (Workload{}) {
				c.owners.remember(doc.Namespace+"/"+p.Name, Workload{doc.Kind, doc.Name})
			}
			if _, known := c.places.gone[types.UID(p.UID)]; !known && p.UID != "" && p.Node != "" {
				c.places.remember(types.UID(p.UID), Place{doc.Namespace, p.Name, p.Node})
			}
		}
		if newest && doc.Deleted.IsZero() {
			r, d := c.documents.record(k), deployed{revision: doc.Revision}
			for _, i := range doc.Containers {
				d.images = append(d.images, image{i.Name, i.Image})
			}
			r.recalled, r.deployed = true, d
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("read the last documents of objects: %w", err)
	}
	return nil
}
