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

// Report is a bridge's status. It is stored in a ConfigMap, for `polymesh bridge status`, and for the bridge itself
// after a restart.
type Report struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Registry  string `json:"registry"`
	Domain    string `json:"domain"`
	// Written is when the bridge last wrote a report, and Answered when the registry last responded.
	Written  time.Time `json:"written"`
	Answered time.Time `json:"answered"`
	// Interval is the time between passes, in seconds.
	Interval   float64         `json:"intervalSeconds"`
	Error      string          `json:"error,omitempty"`
	Services   []ServiceReport `json:"services"`
	Advertised []AdvertReport  `json:"advertised"`
	Problems   []Problem       `json:"problems"`
	Holding    *Holding        `json:"holding,omitempty"`
	// Omitted counts what did not fit into the ConfigMap.
	Omitted *Omitted `json:"omitted,omitempty"`
}

// Omitted counts what is missing in a stored report.
type Omitted struct {
	Services  int `json:"services,omitempty"`
	Instances int `json:"instances,omitempty"` // in the mesh, left out, held or missing
	Problems  int `json:"problems,omitempty"`
}

// ServiceReport is the status of a registry's service in the mesh.
type ServiceReport struct {
	Name      string    `json:"name"`
	Host      string    `json:"host"`
	Instances []string  `json:"instances"`
	LeftOut   []LeftOut `json:"leftOut,omitempty"`
	// Held are the instances hidden from callers outside, because the mesh has taken them over.
	Held []string `json:"held,omitempty"`
	// Members and Others are the numbers of Instances and LeftOut, set if the lists are shortened.
	Members int `json:"members,omitempty"`
	Others  int `json:"others,omitempty"`
}

// Counts returns how many instances are in the mesh, left out, and held.
func (s ServiceReport) Counts() (members, others, held int) {
	return max(s.Members, len(s.Instances)), max(s.Others, len(s.LeftOut)), len(s.Held)
}

// LeftOut is an instance that is not in the mesh.
type LeftOut struct {
	Instance string `json:"instance"`
	Reason   string `json:"reason"`
}

// AdvertReport is the status of a Service of the mesh in the registry. Address is empty if it is not registered.
type AdvertReport struct {
	Name      string `json:"name"`
	Service   string `json:"service"`
	Address   string `json:"address,omitempty"`
	TakesOver bool   `json:"takesOver,omitempty"`
}

// Problem is something that needs the user's attention.
type Problem struct {
	Service string `json:"service"`
	Message string `json:"message"`
}

// Holding is set while instances are missing in the registry but kept in the mesh until a time.
type Holding struct {
	Since     time.Time `json:"since"`
	Until     time.Time `json:"until"`
	Instances []string  `json:"instances"`
}

// next starts the report of the next pass, with the values that the pass does not determine again.
func (r Report) next(o Options, now time.Time) Report {
	r.Name, r.Namespace, r.Registry, r.Domain = o.Name, o.Namespace, o.Registry.String(), o.Domain
	r.Interval, r.Written, r.Error = o.Interval.Seconds(), now, ""
	return r
}

// silent reports whether the registry did not respond in the last pass.
func (r Report) silent() bool { return r.Answered.Before(r.Written) }

// Old reports whether the bridge has stopped writing, which it does at least every rewrite.
func (r Report) Old(now time.Time) bool {
	return now.Sub(r.Written) > 3*max(rewrite, time.Duration(r.Interval*float64(time.Second)))
}

// Healthy reports whether nothing needs the user's attention.
func (r Report) Healthy(now time.Time) bool {
	return r.Error == "" && len(r.Problems) == 0 && r.Holding == nil && !r.Old(now)
}

// rewrite is the interval at which an unchanged report is written again.
const rewrite = time.Minute

const reportKey = "report.json"

func reportName(bridge string) string { return managedBy + "-" + bridge }

// ErrNoReport means that no bridge has written a report.
var ErrNoReport = errors.New("no bridge with that name has run in this cluster")

// ReadReports reads the reports in a namespace, or in all if it is empty.
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
		return r, fmt.Errorf("the report in ConfigMap %s/%s is not valid: %w; delete it, and the bridge writes it again", m.Namespace, m.Name, err)
	}
	return r, nil
}

// maxReport limits a report, in bytes; a ConfigMap may have 1 MiB (MaxSecretSize in k8s.io/api/core/v1). The lists of a
// registry have no such limit.
const maxReport = 768 << 10

// text returns the encoded report: complete if it fits, and otherwise with shortened lists.
func (r Report) text() ([]byte, error) {
	for n := maxInstances; ; n /= 2 {
		text, err := json.Marshal(r.shortened(n))
		if err != nil || len(text) <= maxReport || n == 0 {
			return text, err
		}
	}
}

// shortened returns a report with lists of at most n entries, and with truncated texts.
func (r Report) shortened(n int) Report {
	var omitted Omitted
	cut := func(length int, count *int) int {
		*count += max(0, length-n)
		return min(length, n)
	}
	r.Error = shorten(r.Error, 16<<10)
	// Held instances matter most, then those in the mesh.
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

// save writes the report if it has changed or is due.
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
