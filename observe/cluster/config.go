package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/excerpt"
)

// Kinds of ConfigMaps with which users configure the store: values of ConfigLabel.
const (
	Scrape = "scrape" // with a prometheus.yml
	Rules  = "rules"  // with files of recording and alerting rules
)

// Limits of users' ConfigMaps. The oldest ones are used.
const (
	maxConfigs     = 64
	maxConfigBytes = 256 << 10
	maxConfigsSum  = 2 << 20
)

// configWait is how long to wait for further changes before a change is delivered.
const configWait = 2 * time.Second

// Config is a ConfigMap with which a user configures the store. Its contents are the user's.
type Config struct {
	Namespace, Name string
	Kind            string // Scrape or Rules
	Data            map[string]string
}

// users holds what is delivered to Options.Configs. The Cluster's mutex guards it.
type users struct {
	wake    chan struct{}
	known   bool // Options.Configs was called
	limiter *rate.Limiter
}

func newUsers() users {
	return users{wake: make(chan struct{}, 1), limiter: rate.NewLimiter(rate.Every(5*time.Second), 20)}
}

// tooBig replaces the data of a ConfigMap that is too big.
const tooBig = "polymesh.dev/too-big"

func trimConfig(object any) *corev1.ConfigMap {
	m, ok := object.(*corev1.ConfigMap)
	if !ok {
		return nil
	}
	trimMeta(&m.ObjectMeta, func(name string) bool { return name == ConfigLabel }, tooBig)
	m.BinaryData = nil
	if n := sizeOf(m); n > maxConfigBytes {
		m.Data, m.Annotations = nil, map[string]string{tooBig: strconv.Itoa(n)}
	}
	return m
}

func sizeOf(m *corev1.ConfigMap) (n int) {
	for name, text := range m.Data {
		n += len(name) + len(text)
	}
	return n
}

func (c *Cluster) configChanged(old, now *corev1.ConfigMap) {
	if old == nil || now == nil || old.ResourceVersion != now.ResourceVersion {
		c.users.changed()
	}
}

func (u *users) changed() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// configsKnown schedules the delivery of the ConfigMaps once they are known, even if there are none.
func (c *Cluster) configsKnown() {
	if c.configs.synced && !c.users.known {
		c.users.known = true
		c.users.changed()
	}
}

// deliver calls Options.Configs when ConfigMaps are known, and after changes.
func (c *Cluster) deliver(ctx context.Context) {
	if c.opts.Configs == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.users.wake:
		}
		sleep(ctx, configWait)
		c.mu.Lock()
		synced := c.configs.synced
		c.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		if !synced {
			continue
		}
		configs, problems := chooseConfigs(c.configs.all())
		for i, p := range problems {
			if err := c.Report(ctx, p.Namespace, p.Name, p.message); err != nil {
				c.log.Warn("problems of users' ConfigMaps are not reported", "number", len(problems)-i, "namespace", p.Namespace, "configmap", p.Name, "problem", p.message, "err", err)
				break
			}
		}
		c.opts.Configs(ctx, configs)
	}
}

type configProblem struct{ Namespace, Name, message string }

// chooseConfigs returns the usable ConfigMaps, by namespace and name, and the problems of the others.
func chooseConfigs(all []*corev1.ConfigMap) (configs []Config, problems []configProblem) {
	slices.SortFunc(all, func(a, b *corev1.ConfigMap) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	sum := 0
	for _, m := range all {
		kind, problem := m.Labels[ConfigLabel], ""
		switch {
		case kind != Scrape && kind != Rules:
			problem = fmt.Sprintf("label %s has the value %q: it must be %q or %q", ConfigLabel, excerpt.Of(kind, maxShort), Scrape, Rules)
		case m.Annotations[tooBig] != "":
			problem = fmt.Sprintf("it has %s bytes, more than %d: nothing of it is used", m.Annotations[tooBig], maxConfigBytes)
		case len(configs) == maxConfigs:
			problem = fmt.Sprintf("there are %d older ConfigMaps with the label %s, more are not used", maxConfigs, ConfigLabel)
		case sum+sizeOf(m) > maxConfigsSum:
			problem = fmt.Sprintf("all ConfigMaps with the label %s together have more than %d bytes: this one is not used", ConfigLabel, maxConfigsSum)
		}
		if problem != "" {
			problems = append(problems, configProblem{m.Namespace, m.Name, problem})
			continue
		}
		sum += sizeOf(m)
		configs = append(configs, Config{m.Namespace, m.Name, kind, m.Data})
	}
	slices.SortFunc(configs, func(a, b Config) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return configs, problems
}

// maxNote is the longest note of an event that the API server accepts.
const maxNote = 1024

// Report writes a problem of a user's ConfigMap as an event on it, which `kubectl describe` shows. The same problem of the same version of the
// ConfigMap is written once an hour, for as long as Kubernetes keeps events.
func (c *Cluster) Report(ctx context.Context, namespace, name, problem string) error {
	c.mu.Lock()
	client, m := c.client, c.configs.get(namespace, name)
	c.mu.Unlock()
	if client == nil {
		return errors.New("the API server is not known yet")
	}
	if m == nil {
		return fmt.Errorf("there is no ConfigMap %s in namespace %s with the label %s any more", name, namespace, ConfigLabel)
	}
	if !c.users.limiter.Allow() {
		return errors.New("too many problems of ConfigMaps were reported in the last minutes")
	}
	id := identify("problem", string(m.UID), m.ResourceVersion, problem)
	event := &eventsv1.Event{
		// With this name it is the same event if it was written before, also by another process.
		ObjectMeta: metav1.ObjectMeta{Name: eventName(name, id), Namespace: namespace},
		EventTime:  metav1.NowMicro(),
		Regarding:  corev1.ObjectReference{APIVersion: "v1", Kind: "ConfigMap", Namespace: namespace, Name: name, UID: m.UID, ResourceVersion: m.ResourceVersion},
		Reason:     "ConfigNotUsed", Action: "Configure", Type: warning, Note: excerpt.Of(problem, maxNote), ReportingController: Name, ReportingInstance: Name,
	}
	_, err := client.EventsV1().Events(namespace).Create(ctx, event, metav1.CreateOptions{FieldManager: Name})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("write an event on configmap/%s in namespace %s: %w", name, namespace, err)
	}
	return nil
}

func eventName(name string, id uint64) string {
	return fmt.Sprintf("%s.%016x", strings.TrimRight(name[:min(len(name), 200)], ".-"), id)
}
