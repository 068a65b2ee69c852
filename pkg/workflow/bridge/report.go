package bridge

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
)

// Report is what a bridge says of itself. It lies in a ConfigMap, for `polymesh bridge status`, and for the bridge itself
// when it starts again.
type Report struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Registry  string `json:"registry"`
	Domain    string `json:"domain"`
	// Written is when the bridge has last said anything, and Answered when the registry has.
	Written  time.Time `json:"written"`
	Answered time.Time `json:"answered"`
	// Interval is how often the bridge looks, in seconds.
	Interval   float64         `json:"intervalSeconds"`
	Error      string          `json:"error,omitempty"`
	Services   []ServiceReport `json:"services"`
	Advertised []AdvertReport  `json:"advertised"`
	Problems   []Problem       `json:"problems"`
	Holding    *Holding        `json:"holding,omitempty"`
	// Omitted is how much did not fit into the ConfigMap.
	Omitted *Omitted `json:"omitted,omitempty"`
}

// Omitted counts what a written report is without.
type Omitted struct {
	Services  int `json:"services,omitempty"`
	Instances int `json:"instances,omitempty"` // in the mesh, left out, held or missing
	Problems  int `json:"problems,omitempty"`
}

// ServiceReport is a service of the registry in the mesh.
type ServiceReport struct {
	Name      string    `json:"name"`
	Host      string    `json:"host"`
	Instances []string  `json:"instances"`
	LeftOut   []LeftOut `json:"leftOut,omitempty"`
	// Held are the instances that callers outside do not see, because the mesh has taken them over.
	Held []string `json:"held,omitempty"`
	// Members and Others are how many Instances and LeftOut there are, where the lists are shortened.
	Members int `json:"members,omitempty"`
	Others  int `json:"others,omitempty"`
}

// Counts are how many instances are in the mesh, left out, and held.
func (s ServiceReport) Counts() (members, others, held int) {
	return max(s.Members, len(s.Instances)), max(s.Others, len(s.LeftOut)), len(s.Held)
}

// LeftOut is an instance that is not in the mesh.
type LeftOut struct {
	Instance string `json:"instance"`
	Reason   string `json:"reason"`
}

// AdvertReport is a Service of the mesh in the registry. Address is empty where it is not there.
type AdvertReport struct {
	Name      string `json:"name"`
	Service   string `json:"service"`
	Address   string `json:"address,omitempty"`
	TakesOver bool   `json:"takesOver,omitempty"`
}

// Problem is something that a user has to decide.
type Problem struct {
	Service string `json:"service"`
	Message string `json:"message"`
}

// Holding says that instances are missing in the registry, and stay in the mesh until a time.
type Holding struct {
	Since     time.Time `json:"since"`
	Until     time.Time `json:"until"`
	Instances []string  `json:"instances"`
}

// next begins the report of the next pass: what is not found out again is as it was.
func (r Report) next(o Options, now time.Time) Report {
	r.Name, r.Namespace, r.Registry, r.Domain = o.Name, o.Namespace, o.Registry.String(), o.Domain
	r.Interval, r.Written, r.Error = o.Interval.Seconds(), now, ""
	return r
}

// silent reports whether the registry did not answer when it was asked last.
func (r Report) silent() bool { return r.Answered.Before(r.Written) }

// Old reports whether the bridge has stopped writing, which it does every rewrite at least.
func (r Report) Old(now time.Time) bool {
	return now.Sub(r.Written) > 3*max(rewrite, time.Duration(r.Interval*float64(time.Second)))
}

// Well reports whether there is nothing for a user to look at.
func (r Report) Well(now time.Time) bool {
	return r.Error == "" && len(r.Problems) == 0 && r.Holding == nil && !r.Old(now)
}

// rewrite is how often a report is written that says nothing new.
const rewrite = time.Minute

const reportKey = "report.json"

func reportName(bridge string) string { return managedBy + "-" + bridge }

// ErrNoReport says that no bridge has ever written one.
var ErrNoReport = errors.New("no bridge of that name has run here")

// ReadReports reads the reports of a namespace, or of all where it is empty.
func ReadReports(ctx context.Context, client kubernetes.Interface, namespace string) ([]Report, error) {
	list, err := client.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{LabelSelector: managedByLabel + "=" + managedBy})
	if err != nil {
		return nil, fmt.Errorf("read the bridges' reports: %w", err)
	}
	var reports []Report
	for _, m := range list.Items {
		r, err := parseReport(&m)
		if err != nil {
			return nil, err
		}
		reports = append(reports, r)
	}
	return reports, nil
}

func readReport(ctx context.Context, client kubernetes.Interface, namespace, bridge string) (Report, error) {
	m, err := client.CoreV1().ConfigMaps(namespace).Get(ctx, reportName(bridge), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return Report{}, ErrNoReport
	}
	if err != nil {
		return Report{}, fmt.Errorf("read the last report: %w", err)
	}
	return parseReport(m)
}

func parseReport(m *corev1.ConfigMap) (Report, error) {
	var r Report
	if err := json.Unmarshal([]byte(m.Data[reportKey]), &r); err != nil {
		return r, fmt.Errorf("the report in ConfigMap %s/%s cannot be read: %w; delete it, a bridge writes it again", m.Namespace, m.Name, err)
	}
	return r, nil
}

// maxReport is how much of a ConfigMap a report takes, which may have 1 MiB (MaxSecretSize in k8s.io/api/core/v1). The lists of a
// registry have no such bound.
const maxReport = 768 << 10

// text is the report as it is written: whole if it fits, and otherwise with lists that are short enough.
func (r Report) text() ([]byte, error) {
	for n := maxInstances; ; n /= 2 {
		text, err := json.Marshal(r.shortened(n))
		if err != nil || len(text) <= maxReport || n == 0 {
			return text, err
		}
	}
}

// shortened is a report with lists of at most n entries, and texts that are not much longer.
func (r Report) shortened(n int) Report {
	var omitted Omitted
	cut := func(length int, count *int) int {
		*count += max(0, length-n)
		return min(length, n)
	}
	r.Error = shorten(r.Error, 16<<10)
	// What others must not see counts most, then what is in the mesh.
	services := slices.Clone(r.Services)
	slices.SortStableFunc(services, func(a, b ServiceReport) int {
		return cmp.Or(cmp.Compare(min(1, len(b.Held)), min(1, len(a.Held))), cmp.Compare(min(1, len(b.Instances)), min(1, len(a.Instances))))
	})
	services = services[:cut(len(services), &omitted.Services)]
	slices.SortFunc(services, func(a, b ServiceReport) int { return strings.Compare(a.Name, b.Name) })
	for i := range services {
		s := &services[i]
		s.Members, s.Others = 0, 0
		if len(s.Instances) > n {
			s.Members = len(s.Instances)
		}
		if len(s.LeftOut) > n {
			s.Others = len(s.LeftOut)
		}
		s.Instances = s.Instances[:cut(len(s.Instances), &omitted.Instances)]
		s.LeftOut = s.LeftOut[:cut(len(s.LeftOut), &omitted.Instances)]
		s.Held = s.Held[:cut(len(s.Held), &omitted.Instances)]
	}
	r.Services = services
	r.Advertised = r.Advertised[:cut(len(r.Advertised), &omitted.Services)]
	r.Problems = slices.Clone(r.Problems[:cut(len(r.Problems), &omitted.Problems)])
	for i := range r.Problems {
		r.Problems[i].Message = shorten(r.Problems[i].Message, 4<<10)
	}
	if r.Holding != nil {
		holding := *r.Holding
		holding.Instances = holding.Instances[:cut(len(holding.Instances), &omitted.Instances)]
		r.Holding = &holding
	}
	if r.Omitted = nil; omitted != (Omitted{}) {
		r.Omitted = &omitted
	}
	return r
}

// save writes a report that says something new, or is due.
func (b *Bridge) save(ctx context.Context, r Report) error {
	before, now := b.last, r
	before.Written, before.Answered, now.Written, now.Answered = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	if reflect.DeepEqual(before, now) && r.Written.Sub(b.saved) < rewrite {
		return nil
	}
	text, err := r.text()
	if err != nil {
		return err
	}
	m := applycorev1.ConfigMap(reportName(b.Name), b.Namespace).
		WithLabels(map[string]string{managedByLabel: managedBy, registryLabel: b.Name}).
		WithData(map[string]string{reportKey: string(text)})
	if _, err := b.cluster.core.CoreV1().ConfigMaps(b.Namespace).Apply(ctx, m, metav1.ApplyOptions{FieldManager: b.cluster.fieldManager, Force: true}); err != nil {
		return err
	}
	b.saved = r.Written
	return nil
}
