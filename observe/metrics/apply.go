package metrics

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/discovery/kubernetes"

	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// UserConfig is the part of a labelled ConfigMap that is about metrics.
type UserConfig struct {
	Namespace, Name string
	// Prometheus is a prometheus.yml. nil means that there is none.
	Prometheus []byte
	// Rules are files with rules, by key.
	Rules map[string][]byte
}

// Problem tells the author of a UserConfig why a part of it is not used, or not as written.
type Problem struct {
	Namespace, Name string
	// Where is the job, the rules' key, or empty.
	Where   string
	Message string
}

// maxUsers is how many ConfigMaps are read.
const maxUsers = 200

// Apply sets the jobs, Alertmanagers and rules to those of the store and of these users. What has not changed continues with its
// targets and the state of its alerts. Each call must pass all users.
//
// It returns the problems of users. An error is about the store itself; the rest is applied.
func (m *Metrics) Apply(ctx context.Context, users []UserConfig) ([]Problem, error) {
	m.applying.Lock()
	defer m.applying.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var problems []Problem
	// The same ones are left out each time.
	users = slices.SortedFunc(slices.Values(users), func(a, b UserConfig) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	if len(users) > maxUsers {
		for _, u := range users[maxUsers:] {
			problems = append(problems, Problem{u.Namespace, u.Name, "", fmt.Sprintf("there are more than %d ConfigMaps for the store, so this one is not used", maxUsers)})
		}
		users = users[:maxUsers]
	}

	var parsed []scrapeconfig.User
	for _, u := range users {
		if u.Prometheus == nil {
			continue
		}
		p, ps := scrapeconfig.Merge(u.Prometheus, scrapeconfig.Origin{Namespace: u.Namespace, Name: u.Name}, m.opts.Kubeconfig)
		for _, q := range ps {
			problems = append(problems, Problem{u.Namespace, u.Name, q.Job, q.Message})
		}
		parsed = append(parsed, p)
	}
	c, left := scrapeconfig.Join(m.opts.Base, parsed)
	for o, ps := range left {
		for _, p := range ps {
			problems = append(problems, Problem{o.Namespace, o.Name, p.Job, p.Message})
		}
	}

	files, ps, err := userRules(users)
	problems = append(problems, ps...)
	err = errors.Join(err, m.applyConfig(c), m.applyRules(c, files))
	m.current.set(c, err)
	return problems, err
}

func (m *Metrics) applyConfig(c *config.Config) error {
	// As in Prometheus, each part knows its settings before targets arrive.
	err := errors.Join(m.targets.apply(c), m.notifier.ApplyConfig(c))
	sources := map[string]discovery.Configs{}
	for k, a := range c.AlertingConfig.AlertmanagerConfigs.ToMap() {
		sources[k] = a.ServiceDiscoveryConfigs
	}
	if len(sources) > 0 {
		m.notify()
	}
	if err = errors.Join(err, m.notifySD.ApplyConfig(sources)); err != nil {
		return fmt.Errorf("apply the jobs: %w", err)
	}
	return nil
}

// userRules parses users' rules. The default ones come first.
func userRules(users []UserConfig) ([]rulefiles.File, []Problem, error) {
	d, err := rulefiles.Default()
	if err != nil {
		return nil, nil, err
	}
	files, left := []rulefiles.File{d}, rulefiles.MaxRules
	var problems []Problem
	for _, u := range users {
		for _, key := range slices.Sorted(maps.Keys(u.Rules)) {
			f, ps := rulefiles.Parse(u.Rules[key], u.Namespace, u.Name, key)
			for _, p := range ps {
				problems = append(problems, Problem{u.Namespace, u.Name, key, p.Message})
			}
			switch {
			case len(ps) > 0:
			case f.Rules > left:
				problems = append(problems, Problem{u.Namespace, u.Name, key, fmt.Sprintf("all ConfigMaps together have more than %d rules, so none of this file is used", rulefiles.MaxRules)})
			default:
				left -= f.Rules
				files = append(files, f)
			}
		}
	}
	return files, problems, nil
}

// current is what was applied last.
type current struct {
	mu     sync.Mutex
	config *config.Config
	err    error
	at     time.Time
}

func (c *current) set(cfg *config.Config, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.config, c.err = cfg, err
	if err == nil {
		c.at = time.Now()
	}
}

func (c *current) get() (*config.Config, time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.config, c.at, c.err
}

func (c *current) problem() string {
	if _, _, err := c.get(); err != nil {
		return err.Error()
	}
	return ""
}

// register registers the metrics of Prometheus' main program, which dashboards use.
func (c *current) register(reg prometheus.Registerer) {
	reg.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "prometheus_config_last_reload_successful", Help: "Whether the last configuration was applied."}, func() float64 {
			if c.problem() != "" {
				return 0
			}
			return 1
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "prometheus_config_last_reload_success_timestamp_seconds", Help: "When a configuration was applied last."}, func() float64 {
			_, at, _ := c.get()
			return float64(at.UnixMilli()) / 1000
		}),
	)
}

// kubeconfigInterval is how often to check for a missing kubeconfig.
const kubeconfigInterval = 10 * time.Second

// followKubeconfig starts the discovery of pods once its kubeconfig exists: the store may start before the server has
// written it.
func (m *Metrics) followKubeconfig(ctx context.Context) {
	ticker := time.NewTicker(kubeconfigInterval)
	defer ticker.Stop()
	missing := m.missingKubeconfig()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		was := missing
		if missing = m.missingKubeconfig(); !was || missing {
			continue
		}
		m.applying.Lock()
		c, _, _ := m.current.get()
		err := m.targets.discover(c)
		m.applying.Unlock()
		if err != nil {
			m.log.Error("discovery was not started again", "error", err)
		}
	}
}

// missingKubeconfig reports whether a job's discovery has no kubeconfig.
func (m *Metrics) missingKubeconfig() bool {
	c, _, _ := m.current.get()
	for _, j := range c.ScrapeConfigs {
		for _, s := range j.ServiceDiscoveryConfigs {
			if k, ok := s.(*kubernetes.SDConfig); ok {
				if _, err := os.Stat(k.KubeConfig); err != nil {
					return true
				}
			}
		}
	}
	return false
}
