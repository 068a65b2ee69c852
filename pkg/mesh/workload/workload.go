// Package workload names a workload as Istio's standard metrics do, in one text that fits where only one fits: in a
// certificate, in the metadata of an endpoint, in a tag of an Envoy statistic.
//
// pkg/mesh/certify writes the text into certificates, pkg/mesh/dialect into Envoy's configuration, and
// pkg/mesh/exposition takes it apart again into labels.
package workload

import (
	"bytes"
	"strings"
)

// Workload is who serves or sends a request. Any field may be empty.
type Workload struct {
	Name              string
	Namespace         string
	CanonicalService  string
	CanonicalRevision string
	Cluster           string
	App               string
	Version           string
}

// Labels are the endings of the metric labels that a workload has, after source_ or destination_, in the order of String.
var Labels = []string{
	"workload", "workload_namespace", "canonical_service", "canonical_revision", "cluster", "app", "version",
}

// separator is Istio's own: the text begins as what istiod says about an endpoint's workload
// (istio.io/istio/pilot/pkg/networking/util/util.go, AppendLbEndpointMetadata). No value of a label can hold it.
const separator = ";"

// String is the workload as one text: its values in the order of Labels.
func (w Workload) String() string { return strings.Join(w.Values(), separator) }

// Values are the workload's values in the order of Labels.
func (w Workload) Values() []string {
	return []string{w.Name, w.Namespace, w.CanonicalService, w.CanonicalRevision, w.Cluster, w.App, w.Version}
}

// Latest is Istio's canonical revision of a workload that has none.
const Latest = "latest"

// Said is Istio's text about an endpoint: a workload without the labels app and version. It is a part of the message that
// holds it, for there are endpoints by the thousand.
type Said [5][]byte

// Split takes Istio's text about an endpoint apart.
func Split(text []byte) (s Said, ok bool) {
	last := len(s) - 1
	for i := range last {
		var rest []byte
		if s[i], rest, ok = bytes.Cut(text, []byte(separator)); !ok {
			return s, false
		}
		text = rest
	}
	s[last] = text
	return s, !bytes.Contains(text, []byte(separator))
}

// Namespace is the workload's.
func (s Said) Namespace() []byte { return s[1] }

// LabelsApart is what has to be said of the labels beside it, "app;version", or nothing where they are the canonical service
// and revision, as they are where nobody has set these. WithLabels reads it.
func (s Said) LabelsApart(app, version string) string {
	service, revision := s[2], s[3]
	if app == string(service) && (version == string(revision) && version != Latest || version == "" && string(revision) == Latest) {
		return ""
	}
	return app + separator + version
}

// WithLabels is the workload with the labels that LabelsApart said.
func (w Workload) WithLabels(apart string) Workload {
	if app, version, ok := strings.Cut(apart, separator); ok {
		w.App, w.Version = app, version
		return w
	}
	w.App, w.Version = w.CanonicalService, w.CanonicalRevision
	if w.Version == Latest {
		w.Version = ""
	}
	return w
}

// Parse reads what String wrote, or Istio's shorter text about an endpoint, in which app and version are missing. It
// reports false for anything else.
func Parse(text string) (Workload, bool) {
	values := strings.Split(text, separator)
	const short = 5
	if len(values) != short && len(values) != len(Labels) {
		return Workload{}, false
	}
	values = append(values, "", "")
	return Workload{values[0], values[1], values[2], values[3], values[4], values[5], values[6]}, true
}
