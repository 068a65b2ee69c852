package ingest

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"

	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/journal"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/wire"
)

const (
	// ahead is how far in the future a line or sample may be: a machine joins a cluster with a clock that is up to two minutes off.
	ahead = 3 * time.Minute
	// maxStreams is how many streams a node may have per day, maxSeries how many series per two hours, maxSamples how many samples at a time.
	maxStreams, maxSeries, maxSamples = 4000, 2000, 2000
	streamPeriod, seriesPeriod        = 24 * time.Hour, 2 * time.Hour
	// maxValue is the longest value of a sample's label.
	maxValue = 256
	// podWait is how long a pod may be unknown: the API server notifies the node and the store at about the same time. maxUnknown bounds such pods,
	// and one older than unknownAge makes room for another.
	podWait    = 10 * time.Second
	podPoll    = 2 * time.Second
	maxUnknown = 256
	unknownAge = 5 * time.Minute
)

// collected is the part of a chunk that may be stored.
type collected struct {
	in      *Ingest
	node    *node
	now     time.Time
	streams []*stream
	index   map[streamKey]*stream
	samples []sample
	pods    map[string]Pod

	count, rejected, repeated int64 // lines and samples
	reason                    string
}

// streamKey names a stream of a node.
type streamKey struct{ job, namespace, pod, uid, container, stream string }

// stream has the lines of one stream.
type stream struct {
	key     streamKey
	labels  []logstore.Field
	entries []logstore.Entry
}

type sample struct {
	at     int64
	labels labels.Labels
	value  float64
}

// unknownPodError means that a pod is not known yet.
type unknownPodError struct{ wait time.Duration }

func (e *unknownPodError) Error() string { return "a pod is not known yet" }

func (in *Ingest) collect(n *node, now time.Time) *collected {
	return &collected{in: in, node: n, now: now, index: map[streamKey]*stream{}, pods: map[string]Pod{}}
}

func (c *collected) reject(n int, reason string) {
	c.rejected += int64(n)
	if c.reason == "" {
		c.reason = excerpt.Of(reason, 200)
	}
}

// add collects a record.
func (c *collected) add(r wire.Record) error {
	if r.Lines != nil {
		c.count += int64(len(r.Lines.Texts))
		if err := c.addLines(r.Lines); err != nil {
			return err
		}
	}
	if r.Samples != nil {
		c.count += int64(len(r.Samples.Values))
		c.addSamples(r.Samples)
	}
	return nil
}

var (
	nameForm      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	numberForm    = regexp.MustCompile(`^[0-9]{1,18}$`)
	containerKind = []string{"stdout", "stderr", "unknown", podlogs.StreamPolymesh}
)

// addLines collects the lines of a record, or rejects them. The labels are built from checked values.
func (c *collected) addLines(l *wire.Lines) error {
	if len(l.Times) != len(l.Texts) || len(l.Texts) == 0 {
		c.reject(1, "a record has not as many times as lines")
		return nil
	}
	k := streamKey{job: l.Labels["job"], container: l.Labels["container"]}
	var metadata []string
	labelCount := 2
	switch k.job {
	case podlogs.Job:
		k.namespace, k.pod, k.stream, k.uid = l.Labels["namespace"], l.Labels["pod"], l.Labels["stream"], l.Metadata[podlogs.MetaUID]
		labelCount, metadata = 5, []string{podlogs.MetaUID, podlogs.MetaRestart, podlogs.MetaDropped, logstore.Truncated}
	case journal.JobPolymesh:
	case journal.JobKernel:
		labelCount, metadata = 1, []string{journal.MetaUID, journal.MetaPID, journal.MetaProcess}
	default:
		c.reject(len(l.Texts), fmt.Sprintf("a node does not send lines with the job %.40q", k.job))
		return nil
	}
	reason, err := c.check(k, l, labelCount, metadata)
	if err != nil {
		return err
	}
	if reason == "" && !c.node.streams.admit(maphash.Comparable(c.in.hash, k), c.now.Unix()/int64(streamPeriod/time.Second), maxStreams) {
		reason = fmt.Sprintf("the node has more than %d streams of lines today", maxStreams)
	}
	if reason != "" {
		c.reject(len(l.Texts), reason)
		return nil
	}
	s := c.index[k]
	if s == nil {
		s = &stream{key: k, labels: c.labels(k)}
		c.index[k], c.streams = s, append(c.streams, s)
	}
	fields := make([]logstore.Field, 0, len(l.Metadata))
	for _, name := range slices.Sorted(maps.Keys(l.Metadata)) {
		fields = append(fields, logstore.Field{Name: name, Value: l.Metadata[name]})
	}
	oldest, newest := c.now.Add(-c.in.opts.Retention), c.now.Add(ahead)
	for i, text := range l.Texts {
		at := time.Unix(0, l.Times[i]).UTC()
		switch {
		case at.After(newest):
			c.reject(1, fmt.Sprintf("a line is of %s, which is in the future: compare the clocks", at.Format(time.RFC3339)))
		case at.Before(oldest):
			c.reject(1, "a line is older than the store keeps lines")
		default:
			s.entries = append(s.entries, logstore.Entry{Time: at, Labels: s.labels, Line: text, Metadata: fields})
		}
	}
	return nil
}

// check returns why lines are rejected, empty if they are not.
func (c *collected) check(k streamKey, l *wire.Lines, labelCount int, metadata []string) (reason string, err error) {
	if len(l.Labels) != labelCount {
		return fmt.Sprintf("lines with the job %s have %d labels", k.job, labelCount), nil
	}
	for name, value := range l.Metadata {
		if !slices.Contains(metadata, name) || len(value) > maxValue {
			return fmt.Sprintf("lines with the job %s have no metadata %.40q, or not so long", k.job, name), nil
		}
	}
	for _, name := range []string{podlogs.MetaRestart, podlogs.MetaDropped, logstore.Truncated, journal.MetaPID} {
		if value, ok := l.Metadata[name]; ok && !numberForm.MatchString(value) {
			return fmt.Sprintf("the metadata %s is not a number", name), nil
		}
	}
	if k.job != journal.JobKernel && !nameForm.MatchString(k.container) {
		return fmt.Sprintf("%.40q is not the name of a container", k.container), nil
	}
	switch k.job {
	case podlogs.Job:
		if !slices.Contains(containerKind, k.stream) {
			return fmt.Sprintf("%.40q is not a stream of a container", k.stream), nil
		}
		p, known, err := c.pod(k.uid)
		switch {
		case err != nil:
			return "", err
		case !known:
			return fmt.Sprintf("there is no pod %.60q in namespace %.60q with the UID %.40q", k.pod, k.namespace, k.uid), nil
		case p != Pod{k.namespace, k.pod, c.node.name}:
			return fmt.Sprintf("the pod with the UID %.40q is not %.60q in namespace %.60q on this node", k.uid, k.pod, k.namespace), nil
		}
	case journal.JobKernel:
		// The kernel's line belongs to the node itself. A pod in it is left out unless it runs on the node.
		if uid, ok := l.Metadata[journal.MetaUID]; ok {
			p, known, err := c.pod(uid)
			if err != nil {
				return "", err
			}
			if !known || p.Node != c.node.name {
				delete(l.Metadata, journal.MetaUID)
			}
		}
	}
	return "", nil
}

// pod returns the pod with a UID. It waits some time for an unknown pod.
func (c *collected) pod(uid string) (p Pod, known bool, err error) {
	if p, ok := c.pods[uid]; ok {
		return p, true, nil
	}
	p, known, final := c.in.opts.Pod(uid)
	switch {
	case known:
		c.pods[uid] = p
		delete(c.node.unknown, uid)
		return p, true, nil
	case !final:
		return p, false, &refusal{http.StatusServiceUnavailable, "the store does not know the cluster's pods yet", podPoll}
	case uid == "" || len(uid) > 64:
		return p, false, nil
	}
	since, waiting := c.node.unknown[uid]
	if !waiting {
		if len(c.node.unknown) >= maxUnknown {
			maps.DeleteFunc(c.node.unknown, func(_ string, since time.Time) bool { return c.now.Sub(since) > unknownAge })
		}
		if len(c.node.unknown) >= maxUnknown {
			return p, false, nil
		}
		since = c.now
		c.node.unknown[uid] = since
	}
	if c.now.Sub(since) < podWait {
		return p, false, &unknownPodError{podPoll}
	}
	return p, false, nil
}

// labels returns the labels of a stream.
func (c *collected) labels(k streamKey) []logstore.Field {
	all := []logstore.Field{{Name: "job", Value: k.job}, {Name: "node", Value: c.node.name}}
	if k.job != journal.JobKernel {
		all = append(all, logstore.Field{Name: "container", Value: k.container})
	}
	if k.job != podlogs.Job {
		return all
	}
	workload, known := c.in.opts.Workload(k.namespace, k.pod)
	if !known || workload == "" {
		workload = podlogs.GuessWorkload(k.pod)
	}
	return append(all, logstore.Field{Name: "namespace", Value: k.namespace}, logstore.Field{Name: "pod", Value: k.pod},
		logstore.Field{Name: "stream", Value: k.stream}, logstore.Field{Name: "workload", Value: workload})
}

// addSamples collects the samples of a record.
func (c *collected) addSamples(s *wire.Samples) {
	at := time.UnixMilli(s.Time)
	switch {
	case len(s.Values) > maxSamples || len(c.samples) > maxSamples:
		c.reject(len(s.Values), fmt.Sprintf("a node sends more than %d samples at a time", maxSamples))
		return
	case at.After(c.now.Add(ahead)):
		c.reject(len(s.Values), fmt.Sprintf("samples are of %s, which is in the future: compare the clocks", at.Format(time.RFC3339)))
		return
	case at.Before(c.now.Add(-c.in.opts.Retention)):
		c.reject(len(s.Values), "samples are older than the store keeps samples")
		return
	}
	for _, v := range s.Values {
		reason, ls := c.series(v)
		if reason == "" && !c.node.series.admit(ls.Hash(), c.now.Unix()/int64(seriesPeriod/time.Second), maxSeries) {
			reason = fmt.Sprintf("the node has more than %d series", maxSeries)
		}
		if reason != "" {
			c.reject(1, reason)
			continue
		}
		c.samples = append(c.samples, sample{s.Time, ls, v.Value})
	}
}

// series returns the labels of a sample, or why it is rejected.
func (c *collected) series(v wire.Sample) (reason string, ls labels.Labels) {
	names, ok := c.in.opts.Families[v.Name]
	if !ok {
		return fmt.Sprintf("%.60q is not a metric of a node", v.Name), ls
	}
	b := labels.NewScratchBuilder(len(names) + 4)
	found := 0
	for _, name := range names {
		value, ok := v.Labels[name]
		if !ok {
			continue
		}
		if found++; len(value) > maxValue {
			return fmt.Sprintf("the label %s has more than %d bytes", name, maxValue), ls
		}
		if value != "" {
			b.Add(name, strings.ToValidUTF8(value, "\uFFFD"))
		}
	}
	if found != len(v.Labels) {
		return fmt.Sprintf("%s has other labels", v.Name), ls
	}
	b.Add(model.MetricNameLabel, v.Name)
	b.Add("instance", c.node.name)
	b.Add("job", c.in.opts.Job)
	b.Add("node", c.node.name)
	b.Sort()
	return "", b.Labels()
}

const (
	kernelSlack = 5 * time.Second
	// Lines that may be stored already are looked up in spans of recallSpan, because a node can send any times: at most maxLookups
	// per chunk, which read at most maxRecall lines together. A real collector needs less: it repeats the lines of a few seconds.
	// Lines beyond these limits may be stored twice.
	recallSpan = 10 * time.Minute
	maxLookups = 128
	maxRecall  = 50_000
)

// recall looks up lines that are already stored, and counts the cost.
type recall struct {
	in             *Ingest
	lookups, lines int
}

// leaveOut removes the lines that are already stored.
func (in *Ingest) leaveOut(ctx context.Context, n *node, c *collected) error {
	r := &recall{in: in}
	defer func() { n.budget.take(r.lookups*lookupCost + r.lines*lineCost) }()
	for _, s := range c.streams {
		slices.SortStableFunc(s.entries, func(a, b logstore.Entry) int { return a.Time.Compare(b.Time) })
		fresh := s.entries[:0]
		for rest := s.entries; len(rest) > 0; {
			end := slices.IndexFunc(rest, func(e logstore.Entry) bool { return e.Time.Sub(rest[0].Time) > recallSpan })
			if end < 0 {
				end = len(rest)
			}
			known, err := r.known(ctx, s, rest[:end])
			if err != nil {
				return fmt.Errorf("look for lines of node %s that are stored already: %w", n.name, err)
			}
			for _, e := range rest[:end] {
				if known(&e) {
					c.repeated++
				} else {
					fresh = append(fresh, e)
				}
			}
			rest = rest[end:]
		}
		s.entries = fresh
	}
	return nil
}

// known looks up lines of a stream, which are sorted by time. It returns a function that reports whether a line is stored.
func (r *recall) known(ctx context.Context, s *stream, entries []logstore.Entry) (func(*logstore.Entry) bool, error) {
	if r.lookups >= maxLookups || r.lines >= maxRecall {
		return func(*logstore.Entry) bool { return false }, nil
	}
	r.lookups++
	// The times of the kernel's lines are computed at each reading, and differ slightly.
	slack := time.Duration(0)
	if s.key.job == journal.JobKernel {
		slack = kernelSlack
	}
	sel := logstore.Selector{Start: entries[0].Time.Add(-slack), End: entries[len(entries)-1].Time.Add(slack + 1)}
	for _, l := range s.labels {
		if l.Name != "workload" { // it may have become known meanwhile
			sel.Matchers = append(sel.Matchers, logstore.Matcher{Name: l.Name, Value: l.Value})
		}
	}
	if s.key.uid != "" {
		sel.Metadata = []logstore.Matcher{{Name: podlogs.MetaUID, Value: s.key.uid}}
	}
	type line struct {
		at   int64
		text uint64
	}
	stored := map[line]struct{}{}
	keyOf := func(e *logstore.Entry) line {
		k := line{text: maphash.String(r.in.hash, strings.ToValidUTF8(e.Line, "\uFFFD"))}
		if slack == 0 {
			k.at = e.Time.UnixNano()
		}
		return k
	}
	err := r.in.opts.Logs.Each(ctx, sel, func(e logstore.Entry) bool {
		r.lines++
		stored[keyOf(&e)] = struct{}{}
		return r.lines < maxRecall
	})
	return func(e *logstore.Entry) bool { _, ok := stored[keyOf(e)]; return ok }, err
}

// batchLines is how many lines are stored at a time: storing a line takes several times its length in memory.
const batchLines = 1000

// storeLines stores the lines and returns their number. After an error, some may be stored.
func (in *Ingest) storeLines(c *collected) (stored int64, err error) {
	for _, s := range c.streams {
		for entries := range slices.Chunk(s.entries, batchLines) {
			stored += int64(len(entries))
			err := in.opts.Logs.Append(entries)
			var refused *rowstore.RejectedError
			switch {
			case errors.As(err, &refused):
				c.reject(refused.Rows, refused.Reason)
				stored -= int64(refused.Rows)
			case err != nil:
				return 0, fmt.Errorf("store the lines of a node: %w", err)
			}
		}
	}
	return stored, nil
}

// storeSamples stores the samples and returns their number.
func (in *Ingest) storeSamples(ctx context.Context, c *collected) (stored int64, err error) {
	if len(c.samples) == 0 {
		return 0, nil
	}
	app := in.opts.Samples.AppenderV2(ctx)
	for _, s := range c.samples {
		_, err := app.Append(0, s.labels, 0, s.at, s.value, nil, nil, storage.AOptions{})
		switch {
		case err == nil:
			stored++
		case errors.Is(err, storage.ErrDuplicateSampleForTimestamp):
			c.repeated++
		case errors.Is(err, storage.ErrOutOfBounds), errors.Is(err, storage.ErrTooOldSample), errors.Is(err, storage.ErrOutOfOrderSample):
			c.reject(1, "a sample is older than the store accepts, or there are too many series: "+err.Error())
		default:
			return 0, errors.Join(fmt.Errorf("store the samples of a node: %w", err), app.Rollback())
		}
	}
	if err := app.Commit(); err != nil {
		return 0, fmt.Errorf("store the samples of a node: %w", err)
	}
	return stored, nil
}
