package scrapeconfig

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/discovery/dns"
	"github.com/prometheus/prometheus/discovery/kubernetes"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/scrape"
	"go.yaml.in/yaml/v2"

	"polymesh.dev/polymesh/observe/excerpt"
)

// The bounds of one user's file.
const (
	maxFile        = 256 << 10
	maxJobs        = 20
	maxJobName     = 128
	maxRules       = 100 // relabelling rules of a job
	maxDiscovery   = 10  // sources of targets of a job
	maxStatic      = 200 // targets written down in a job
	maxNames       = 20  // namespaces or DNS names of a source: each is a watch or a question of its own
	minInterval    = 5 * time.Second
	maxInterval    = time.Hour
	minRefresh     = 10 * time.Second
	maxManagers    = 5 // Alertmanagers' configurations
	maxProblems    = 50
	maxProblemText = 512
)

const (
	// everybodys is how many jobs all users together may have.
	everybodys = 100
	// maxWatched is how many different Kubernetes sources all users together may have: each keeps its own copy of what it
	// watches, which may be all pods. Equal ones count once, and those of the store's own jobs do not count.
	maxWatched = 8
)

// Origin is the ConfigMap that a user's file is from.
type Origin struct{ Namespace, Name string }

// User is what a user's prometheus.yml adds.
type User struct {
	Origin        Origin
	Jobs          []*config.ScrapeConfig
	Alertmanagers []*config.AlertmanagerConfig
}

// Problem says why a part of a user's file is not used, or not as written.
type Problem struct {
	// Job is the name in the file, empty if the problem is not about a job.
	Job     string
	Message string
}

// Merge reads a user's prometheus.yml and uses its jobs and Alertmanagers.
//
// A user who may write a ConfigMap must not thereby control the machine. So a job that would read files, use the
// machine's credentials or a proxy is left out, and every job gets rules after its own that undo what
// relabelling must not do: a shorter interval, a UNIX socket, another job's name. Addresses are checked when they
// are connected, see Guarded and Forbidden.
//
// Discovery without api_server means Prometheus' own cluster; here it gets the store's kubeconfig.
func Merge(content []byte, from Origin, kubeconfig string) (User, []Problem) {
	u := User{Origin: from}
	m := merge{user: &u, kubeconfig: kubeconfig}
	if len(content) > maxFile {
		m.problem("", "it has %d bytes, at most %d are read", len(content), maxFile)
		return u, m.problems
	}
	c, err := load(string(content))
	if err != nil {
		m.problem("", "Prometheus does not accept it: %s", err)
		return u, m.problems
	}
	m.unused(content)
	for i, j := range c.ScrapeConfigs {
		if i == maxJobs {
			m.problem("", "it has %d jobs, of which the first %d are used", len(c.ScrapeConfigs), maxJobs)
			break
		}
		m.job(j)
	}
	for i, a := range c.AlertingConfig.AlertmanagerConfigs {
		if i == maxManagers {
			m.problem("", "it has %d configurations of Alertmanagers, of which the first %d are used", len(c.AlertingConfig.AlertmanagerConfigs), maxManagers)
			break
		}
		m.alertmanager(a)
	}
	return u, m.problems
}

// Join adds users' jobs to the store's own. Base is not changed. Jobs beyond the bounds for all users together get a problem.
func Join(base *config.Config, users []User) (*config.Config, map[Origin][]Problem) {
	c := *base
	c.ScrapeConfigs = slices.Clone(base.ScrapeConfigs)
	c.AlertingConfig.AlertmanagerConfigs = slices.Clone(base.AlertingConfig.AlertmanagerConfigs)
	// The same ones are left out each time.
	users = slices.SortedFunc(slices.Values(users), func(a, b User) int {
		return strings.Compare(a.Origin.prefix(), b.Origin.prefix())
	})
	problems := map[Origin][]Problem{}
	left := everybodys
	w := watched{left: maxWatched}
	for _, j := range base.ScrapeConfigs {
		w.scraped = append(w.scraped, kubernetesOf(j.ServiceDiscoveryConfigs)...)
	}
	for _, u := range users {
		if len(u.Jobs)+len(u.Alertmanagers) > left {
			problems[u.Origin] = append(problems[u.Origin], Problem{Message: fmt.Sprintf("all ConfigMaps together have more than %d jobs, so none of this one is used", everybodys)})
			continue
		}
		left -= len(u.Jobs) + len(u.Alertmanagers)
		tooMany := func(job, what string) {
			problems[u.Origin] = append(problems[u.Origin], Problem{Job: job, Message: fmt.Sprintf(
				"all ConfigMaps together have more than %d different kubernetes_sd_configs: %s (one with role pod and nothing else is always possible: keep what you want by relabelling)", maxWatched, what)})
		}
		for _, j := range u.Jobs {
			if !w.add(&w.scraped, j.ServiceDiscoveryConfigs) {
				tooMany(strings.TrimPrefix(j.JobName, u.Origin.prefix()), "the job is not used")
				continue
			}
			c.ScrapeConfigs = append(c.ScrapeConfigs, j)
		}
		for _, a := range u.Alertmanagers {
			if !w.add(&w.notified, a.ServiceDiscoveryConfigs) {
				tooMany(alertmanagers, "these Alertmanagers are not used")
				continue
			}
			c.AlertingConfig.AlertmanagerConfigs = append(c.AlertingConfig.AlertmanagerConfigs, a)
		}
	}
	return &c, problems
}

// watched is a set of Kubernetes sources. Targets and Alertmanagers are discovered separately, so they share none.
type watched struct {
	scraped, notified []*kubernetes.SDConfig
	left              int
}

// add adds the sources of a job, if there is room for all.
func (w *watched) add(to *[]*kubernetes.SDConfig, sources discovery.Configs) bool {
	all := slices.Clip(*to)
	for _, k := range kubernetesOf(sources) {
		// Discovery compares them in the same way.
		if !slices.ContainsFunc(all, func(o *kubernetes.SDConfig) bool { return reflect.DeepEqual(o, k) }) {
			all = append(all, k)
		}
	}
	more := len(all) - len(*to)
	if more > w.left {
		return false
	}
	w.left -= more
	*to = all
	return true
}

func kubernetesOf(sources discovery.Configs) (found []*kubernetes.SDConfig) {
	for _, s := range sources {
		if k, ok := s.(*kubernetes.SDConfig); ok {
			found = append(found, k)
		}
	}
	return found
}

// prefix begins the names of a ConfigMap's jobs. Names of namespaces and ConfigMaps have no slash, so no two have the same.
func (o Origin) prefix() string { return o.Namespace + "/" + o.Name + "/" }

type merge struct {
	user       *User
	kubeconfig string
	problems   []Problem
}

func (m *merge) problem(job, format string, args ...any) {
	if len(m.problems) == maxProblems {
		return
	}
	m.problems = append(m.problems, Problem{Job: job, Message: excerpt.Marked(fmt.Sprintf(format, args...), maxProblemText)})
}

// unused reports the settings that have no effect here.
func (m *merge) unused(content []byte) {
	var file struct {
		Global   map[string]any `yaml:"global"`
		Alerting map[string]any `yaml:"alerting"`
		Rest     map[string]any `yaml:",inline"`
	}
	if err := yaml.Unmarshal(content, &file); err != nil {
		return // Prometheus has parsed it, and reports errors
	}
	for _, key := range slices.Sorted(maps.Keys(file.Rest)) {
		switch key {
		case "scrape_configs":
		case "rule_files":
			m.problem("", "rule_files is not used: put rules into a ConfigMap with the label polymesh.dev/observe: rules")
		case "scrape_config_files":
			m.problem("", "scrape_config_files is not used: put the jobs into this file")
		default:
			m.problem("", "%s is not used: the store has its own settings", key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(file.Global)) {
		switch key {
		case "external_labels", "query_log_file", "scrape_failure_log_file", "rule_query_offset":
			m.problem("", "global.%s is not used", key)
		}
	}
	if _, ok := file.Alerting["alert_relabel_configs"]; ok {
		m.problem("", "alerting.alert_relabel_configs is not used: it would change everybody's alerts")
	}
}

// job adds a job, or says why not.
func (m *merge) job(j *config.ScrapeConfig) {
	name := j.JobName
	if len(name) > maxJobName || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		m.problem("", "a job's name has more than %d bytes or signs that cannot be printed: it is not used", maxJobName)
		return
	}
	refused := false
	refuse := func(format string, args ...any) {
		refused = true
		m.problem(name, format+": the job is not used", args...)
	}
	j.ScrapeFailureLogFile = "" // it may be the global one, which unused has reported
	for _, r := range refusals(j, scrapeKeys) {
		refuse("%s", r)
	}
	if len(j.RelabelConfigs) > maxRules || len(j.MetricRelabelConfigs) > maxRules {
		refuse("it has more than %d rules for relabelling", maxRules)
	}
	if why := m.discovery(j.ServiceDiscoveryConfigs); why != "" {
		refuse("%s", why)
	}
	if refused {
		return
	}

	j.JobName = m.user.Origin.prefix() + name
	if d := time.Duration(j.ScrapeInterval); d < minInterval || d > maxInterval {
		j.ScrapeInterval = model.Duration(min(max(d, minInterval), maxInterval))
		m.problem(name, "its interval is %s: %s is used", model.Duration(d), j.ScrapeInterval)
	}
	j.ScrapeTimeout = min(j.ScrapeTimeout, j.ScrapeInterval, model.Duration(maxTimeout))

	j.BodySizeLimit = units.Base2Bytes(limit(int64(j.BodySizeLimit), int64(maxBody), int64(maxBody)))
	j.EnableCompression = false // as in job
	j.SampleLimit = limit(j.SampleLimit, 5000, 10000)
	j.TargetLimit = limit(j.TargetLimit, 200, 500)
	j.LabelLimit = limit(j.LabelLimit, maxLabels, maxLabels)
	j.LabelNameLengthLimit = limit(j.LabelNameLengthLimit, maxLabelName, maxLabelName)
	j.LabelValueLengthLimit = limit(j.LabelValueLengthLimit, maxLabelValue, maxLabelValue)
	j.NativeHistogramBucketLimit = limit(j.NativeHistogramBucketLimit, 160, 160)
	j.KeepDroppedTargets = limit(j.KeepDroppedTargets, 10, 50)

	j.RelabelConfigs = append(slices.Clip(j.RelabelConfigs),
		set(model.JobLabel, escape(j.JobName)),
		set(model.ScrapeIntervalLabel, j.ScrapeInterval.String()),
		set(model.ScrapeTimeoutLabel, j.ScrapeTimeout.String()),
		labelDrop(scrape.UnixSocketLabel),
	)
	// With honor_labels, a target's own label "job" wins.
	j.MetricRelabelConfigs = append(slices.Clip(j.MetricRelabelConfigs), drop(strings.Join(reserved(), "|"), model.JobLabel))
	if err := validate(j.RelabelConfigs, j.MetricRelabelConfigs); err != nil {
		m.problem(name, "%s: the job is not used", err)
		return
	}
	m.user.Jobs = append(m.user.Jobs, j)
}

// reserved are the names of the store's own jobs.
func reserved() []string { return slices.Concat(Local(), guarded, []string{JobKubelet, JobCadvisor}) }

// Reserved reports whether a job is one of the store's own, which other samples may not use.
func Reserved(job string) bool { return slices.Contains(reserved(), job) }

// validate completes the added rules. Prometheus' parser has completed the user's.
func validate(rules ...[]*relabel.Config) error {
	for _, r := range slices.Concat(rules...) {
		if err := r.Validate(model.UTF8Validation); err != nil {
			return err
		}
	}
	return nil
}

// escape escapes a text for a rule's replacement.
func escape(text string) string { return strings.ReplaceAll(text, "$", "$$") }

// limit returns the user's limit, or the default if there is none, and at most the highest.
func limit[T int64 | uint](user, def, highest T) T {
	if user <= 0 {
		user = def
	}
	return min(user, highest)
}

// discovery bounds and completes the sources of targets, and returns why they cannot be used.
func (m *merge) discovery(cs discovery.Configs) string {
	if len(cs) > maxDiscovery {
		return fmt.Sprintf("it has more than %d sources of targets", maxDiscovery)
	}
	for _, c := range cs {
		switch c := c.(type) {
		case *kubernetes.SDConfig:
			if m.kubeconfig == "" {
				return "the store has no access to the cluster, so kubernetes_sd_configs finds nothing"
			}
			c.KubeConfig = m.kubeconfig
			if n := &c.NamespaceDiscovery; n.IncludeOwnNamespace {
				n.IncludeOwnNamespace, n.Names = false, append(n.Names, m.user.Origin.Namespace)
			}
			if len(c.NamespaceDiscovery.Names) > maxNames {
				return fmt.Sprintf("kubernetes_sd_configs has more than %d namespaces: leave them out, and keep those that you want by relabelling", maxNames)
			}
			slices.Sort(c.NamespaceDiscovery.Names)
			c.NamespaceDiscovery.Names = slices.Compact(c.NamespaceDiscovery.Names)
		case *dns.SDConfig:
			if len(c.Names) > maxNames {
				return fmt.Sprintf("dns_sd_configs has more than %d names", maxNames)
			}
			c.RefreshInterval = max(c.RefreshInterval, model.Duration(minRefresh))
		case discovery.StaticConfig:
			n := 0
			for _, g := range c {
				if g == nil {
					return "static_configs has an empty entry"
				}
				for _, t := range g.Targets {
					n++
					if why := forbiddenTarget(string(t[model.AddressLabel])); why != "" {
						return fmt.Sprintf("the target %.100q cannot be asked: %s", t[model.AddressLabel], why)
					}
				}
			}
			if n > maxStatic {
				return fmt.Sprintf("static_configs has more than %d targets", maxStatic)
			}
		}
	}
	return ""
}

// forbiddenTarget checks literal addresses early, as the dialer would later.
func forbiddenTarget(address string) string {
	host := address
	if h, _, err := net.SplitHostPort(address); err == nil {
		host = h
	}
	if ip, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return Forbidden(ip)
	}
	host = "." + strings.ToLower(strings.TrimSuffix(host, "."))
	if strings.HasSuffix(host, ".localhost") || strings.HasSuffix(host, localDomain) {
		return "it is this machine's own"
	}
	return ""
}

// alertmanagers is used instead of a job's name.
const alertmanagers = "alertmanagers"

// alertmanager adds a configuration of Alertmanagers. Alerts are posted through the same dialer, without credentials.
func (m *merge) alertmanager(a *config.AlertmanagerConfig) {
	const name = alertmanagers
	refused := false
	for _, r := range refusals(a, managerKeys) {
		refused = true
		m.problem(name, "%s: these Alertmanagers are not used", r)
	}
	if len(a.RelabelConfigs) > maxRules {
		refused = true
		m.problem(name, "it has more than %d rules for relabelling: these Alertmanagers are not used", maxRules)
	}
	if why := m.discovery(a.ServiceDiscoveryConfigs); why != "" {
		refused = true
		m.problem(name, "%s: these Alertmanagers are not used", why)
	}
	if refused {
		return
	}
	a.Timeout = min(a.Timeout, model.Duration(maxTimeout))
	m.user.Alertmanagers = append(m.user.Alertmanagers, a)
}
