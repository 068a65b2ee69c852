package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	commonconfig "github.com/prometheus/common/config"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"github.com/prometheus/prometheus/scrape"
	"github.com/prometheus/prometheus/storage"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// targets discovers and scrapes. It has one discovery, so that a source of targets that several jobs use is watched once, and
// two scrapers: a scraper has one dialer, see scrapeconfig.Guarded.
type targets struct {
	found         *discovery.Manager
	own, guarded  *scrape.Manager
	places        *places
	toOwn, toRest chan map[string][]*targetgroup.Group
}

func newTargets(found *discovery.Manager, store *bounded, reg prometheus.Registerer, log *slog.Logger, own, guarded commonconfig.DialContextFunc) (*targets, error) {
	t := &targets{found: found, places: &places{}, toOwn: make(chan map[string][]*targetgroup.Group), toRest: make(chan map[string][]*targetgroup.Group)}
	var err error
	if t.own, err = newScraper("own", own, store.scraped(t.places), reg, log); err != nil {
		return nil, err
	}
	if t.guarded, err = newScraper("guarded", guarded, store.guests(), reg, log); err != nil {
		return nil, err
	}
	return t, nil
}

func newScraper(name string, dial commonconfig.DialContextFunc, store storage.AppendableV2, reg prometheus.Registerer, log *slog.Logger) (*scrape.Manager, error) {
	m, err := scrape.NewManager(&scrape.Options{HTTPClientOptions: []commonconfig.HTTPClientOption{commonconfig.WithDialContextFunc(dial)}, DiscoveryReloadOnStartup: true},
		log.With("part", "scrape", "scraper", name), nil, nil, store, prometheus.WrapRegistererWith(prometheus.Labels{"scraper": name}, reg))
	if err != nil {
		return nil, fmt.Errorf("set up the scraper %q: %w", name, err)
	}
	return m, nil
}

// apply changes the jobs. Unchanged jobs continue undisturbed.
func (t *targets) apply(c *config.Config) error {
	own, rest := split(c)
	// The scrapers must know a job before its targets arrive.
	return errors.Join(t.own.ApplyConfig(own), t.guarded.ApplyConfig(rest), t.discover(c))
}

// discover starts and ends the jobs' sources of targets. It retries those that could not be started.
func (t *targets) discover(c *config.Config) error {
	sources := map[string]discovery.Configs{}
	for _, j := range c.ScrapeConfigs {
		sources[j.JobName] = j.ServiceDiscoveryConfigs
	}
	return t.found.ApplyConfig(sources)
}

func split(c *config.Config) (own, rest *config.Config) {
	a, b := *c, *c
	a.ScrapeConfigs, b.ScrapeConfigs = nil, nil
	for _, j := range c.ScrapeConfigs {
		if scrapeconfig.Guarded(j.JobName) {
			b.ScrapeConfigs = append(b.ScrapeConfigs, j)
		} else {
			a.ScrapeConfigs = append(a.ScrapeConfigs, j)
		}
	}
	return &a, &b
}

// run runs until ctx ends and stop has been called.
func (t *targets) run(ctx context.Context) {
	done := make(chan struct{}, 2)
	go func() { _ = t.own.Run(t.toOwn); done <- struct{}{} }()
	go func() { _ = t.guarded.Run(t.toRest); done <- struct{}{} }()
	go func() { _ = t.found.Run() }() // closes SyncCh when ctx ends
	for sets := range t.found.SyncCh() {
		// This must be known before kubelets are scraped.
		if pods, ok := sets[scrapeconfig.JobPods]; ok {
			t.places.found(pods)
		}
		own, rest := map[string][]*targetgroup.Group{}, map[string][]*targetgroup.Group{}
		for job, groups := range sets {
			if scrapeconfig.Guarded(job) {
				rest[job] = withoutManifests(groups)
			} else {
				own[job] = withoutManifests(groups)
			}
		}
		for _, to := range []struct {
			ch  chan map[string][]*targetgroup.Group
			set map[string][]*targetgroup.Group
		}{{t.toOwn, own}, {t.toRest, rest}} {
			select {
			case to.ch <- to.set:
			case <-ctx.Done():
			}
		}
	}
	close(t.toOwn)
	close(t.toRest)
	<-done
	<-done
}

// stop ends the scrapers after their current scrapes. Their last samples mark the series as ended.
func (t *targets) stop() {
	t.own.Stop()
	t.guarded.Stop()
}

// manifests are the labels with the annotation in which kubectl keeps an object's whole manifest, including the values of a pod's
// environment. The API would show them with the targets.
var manifests = func() (names []model.LabelName) {
	for _, kind := range []string{"pod", "service", "endpoints", "endpointslice", "ingress", "node", "namespace"} {
		names = append(names, model.LabelName(model.MetaLabelPrefix+"kubernetes_"+kind+"_annotation_kubectl_kubernetes_io_last_applied_configuration"))
	}
	return names
}()

// withoutManifests removes these labels. The groups belong to discovery, so changed ones are copied.
func withoutManifests(groups []*targetgroup.Group) []*targetgroup.Group {
	out := groups
	for i, g := range groups {
		if !slices.ContainsFunc(append(slices.Clip(g.Targets), g.Labels), func(s model.LabelSet) bool { return hasAny(s, manifests) }) {
			continue
		}
		if &out[0] == &groups[0] {
			out = slices.Clone(groups)
		}
		c := &targetgroup.Group{Source: g.Source, Labels: without(g.Labels, manifests)}
		for _, t := range g.Targets {
			c.Targets = append(c.Targets, without(t, manifests))
		}
		out[i] = c
	}
	return out
}

func hasAny(set model.LabelSet, names []model.LabelName) bool {
	for _, n := range names {
		if _, ok := set[n]; ok {
			return true
		}
	}
	return false
}

func without(set model.LabelSet, names []model.LabelName) model.LabelSet {
	c := maps.Clone(set)
	for _, n := range names {
		delete(c, n)
	}
	return c
}

// counts returns how many targets were read successfully the last time, and how many there are.
func (t *targets) counts() (up, all int) {
	for _, set := range t.TargetsActive() {
		for _, target := range set {
			all++
			if target.Health() == scrape.HealthGood {
				up++
			}
		}
	}
	return up, all
}

// Methods for Prometheus' API. No job is in both scrapers.

func (t *targets) TargetsActive() map[string][]*scrape.Target {
	return merged(t.own.TargetsActive(), t.guarded.TargetsActive())
}

func (t *targets) TargetsDropped() map[string][]*scrape.Target {
	return merged(t.own.TargetsDropped(), t.guarded.TargetsDropped())
}

func (t *targets) TargetsDroppedCounts() map[string]int {
	return merged(t.own.TargetsDroppedCounts(), t.guarded.TargetsDroppedCounts())
}

func (t *targets) ScrapePoolConfig(job string) (*config.ScrapeConfig, error) {
	if scrapeconfig.Guarded(job) {
		return t.guarded.ScrapePoolConfig(job)
	}
	return t.own.ScrapePoolConfig(job)
}

func (t *targets) ScrapePools() []string {
	return append(t.own.ScrapePools(), t.guarded.ScrapePools()...)
}

func merged[V any](a, b map[string]V) map[string]V {
	maps.Copy(a, b)
	return a
}
