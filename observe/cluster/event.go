package cluster

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/logstore"
)

// Limits of Kubernetes' events, which any user can write.
const (
	// eventsPerSecond and eventsBurst apply to each namespace.
	eventsPerSecond, eventsBurst = 10, 1000
	// maxSeen bounds the events that are known by UID. The API server forgets one after an hour.
	maxSeen = 20_000
	// repeatEvery is after what time a repeated event is written again. It is written earlier if its count has doubled.
	repeatEvery = 10 * time.Minute
)

// events passes on Kubernetes' events as they come, instead of keeping them in a table. The Cluster's mutex guards it.
type events struct {
	c       *Cluster
	seen    map[types.UID]seenEvent
	limits  map[string]*rate.Limiter // by namespace
	leftOut int64
	// untold counts, by namespace, the events left out since the last entry about them.
	untold map[string]int
	told   time.Time
}

type seenEvent struct {
	count   int32
	written time.Time
}

func newEvents(c *Cluster) events {
	return events{c: c, seen: map[types.UID]seenEvent{}, limits: map[string]*rate.Limiter{}, untold: map[string]int{}}
}

// Add implements cache.ReflectorStore.
func (e *events) Add(object any) error {
	event := trimEvent(object)
	if event == nil {
		return fmt.Errorf("%T is not an event", object)
	}
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.take(event, time.Now())
	return nil
}

// Update implements cache.ReflectorStore.
func (e *events) Update(object any) error { return e.Add(object) }

// Delete implements cache.ReflectorStore.
func (e *events) Delete(object any) error {
	if o, ok := object.(metav1.Object); ok {
		e.c.mu.Lock()
		defer e.c.mu.Unlock()
		delete(e.seen, o.GetUID())
	}
	return nil
}

// Replace implements cache.ReflectorStore.
func (e *events) Replace(objects []any, _ string) error {
	there := map[types.UID]bool{}
	for _, object := range objects {
		event := trimEvent(object)
		if event == nil {
			continue
		}
		there[event.UID] = true
		e.c.mu.Lock()
		e.take(event, time.Now())
		e.c.mu.Unlock()
	}
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	for uid := range e.seen {
		if !there[uid] {
			delete(e.seen, uid)
		}
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (*events) Resync() error { return nil }

// Transformer implements cache.TransformingStore.
func (*events) Transformer() cache.TransformFunc {
	return func(object any) (any, error) {
		trimEvent(object)
		return object, nil
	}
}

// trimEvent cuts the texts of an event, so that the many events of the first list need little memory.
func trimEvent(object any) *eventsv1.Event {
	e, ok := object.(*eventsv1.Event)
	if !ok {
		return nil
	}
	trimMeta(&e.ObjectMeta, nil)
	clipAt(&e.Note, maxLine)
	for _, text := range []*string{&e.Reason, &e.Action, &e.Type, &e.ReportingController, &e.ReportingInstance, &e.DeprecatedSource.Component, &e.Regarding.Kind, &e.Regarding.Name, &e.Regarding.FieldPath} {
		clipAt(text, maxShort)
	}
	clipAt((*string)(&e.Regarding.UID), maxShort)
	e.Related = nil
	return e
}

// take queues an event, unless it was written before or its namespace has too many.
func (e *events) take(event *eventsv1.Event, now time.Time) {
	count := max(event.DeprecatedCount, 1)
	if event.Series != nil {
		count = max(count, event.Series.Count)
	}
	before, known := e.seen[event.UID]
	if known && (count <= before.count || count < 2*before.count && now.Sub(before.written) < repeatEvery) {
		return
	}
	if len(e.seen) >= maxSeen {
		clear(e.seen)
	}
	e.seen[event.UID] = seenEvent{count, now}
	id := identify(document.Kubernetes, string(event.UID), strconv.Itoa(int(count)))
	if e.c.marks.written[id] {
		return
	}
	limit := e.limits[event.Namespace]
	if limit == nil {
		limit = rate.NewLimiter(eventsPerSecond, eventsBurst)
		e.limits[event.Namespace] = limit
	}
	if !limit.AllowN(now, 1) {
		e.leftOut++
		e.untold[event.Namespace]++
		return
	}
	// An event belongs to the namespace in which its author may write, whatever it is about. For nodes that is "default".
	subject := ref{event.Regarding.Kind, event.Namespace, event.Regarding.Name, event.Regarding.UID}
	e.c.enqueue(pending{
		at: eventTime(event, now), noticed: now, subject: subject, reason: event.Reason, kind: event.Type, source: document.Kubernetes, line: event.Note, id: id, count: count,
		more: append(containerField(event.Regarding.FieldPath), field("reporter", cmp.Or(event.ReportingController, event.DeprecatedSource.Component)), field("action", event.Action)),
	})
}

// eventTime returns when an event last happened, according to its author, if that is plausible.
func eventTime(e *eventsv1.Event, now time.Time) time.Time {
	at := e.EventTime.Time
	if at.IsZero() {
		at = e.DeprecatedLastTimestamp.Time
	}
	if e.Series != nil {
		at = e.Series.LastObservedTime.Time
	}
	if at.IsZero() {
		at = e.CreationTimestamp.Time
	}
	if at.After(now) || now.Sub(at) > 24*time.Hour {
		return now
	}
	return at
}

// tellLeftOut queues an entry for each namespace with events that were left out, once a minute.
func (e *events) tellLeftOut(now time.Time) {
	if now.Sub(e.told) < time.Minute {
		return
	}
	e.told = now
	for namespace, n := range e.untold {
		e.c.enqueue(pending{
			at: now, noticed: now, subject: ref{kind: "Namespace", namespace: namespace, name: namespace}, reason: "EventsLeftOut", kind: warning, source: document.Polymesh,
			line: fmt.Sprintf("%d events of namespace %s are left out: it has more than %d a second", n, namespace, eventsPerSecond), count: int32(n),
			id: identify("EventsLeftOut", namespace, now.Format(time.RFC3339)),
		})
	}
	clear(e.untold)
	// A namespace that has stopped writing has its full burst again.
	for namespace, limit := range e.limits {
		if limit.TokensAt(now) >= eventsBurst {
			delete(e.limits, namespace)
		}
	}
}

// containerField returns the container that an event of a pod is about, in a field.
func containerField(path string) []logstore.Field {
	for _, prefix := range []string{"spec.containers{", "spec.initContainers{"} {
		if rest, ok := strings.CutPrefix(path, prefix); ok {
			return []logstore.Field{field("container", strings.TrimSuffix(rest, "}"))}
		}
	}
	return nil
}
