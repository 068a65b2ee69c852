// Package workload names a workload as Istio's standard metrics do, in one text that fits where only one fits: in a
// certificate, in the metadata of an endpoint, in a tag of an Envoy statistic.
//
// pkg/mesh/certify writes the text into certificates, pkg/mesh/dialect into Envoy's configuration, and
// pkg/mesh/exposition takes it apart again into labels.
package workload

import (
	"bytes"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Workload is who serves or sends a request. Any field may be empty. Most of it is what the author of a pod chose to write, in
// owner references and annotations as free text: Named leaves out what is no name, and String, Parse and Split let nothing else through.
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
// (istio.io/istio/pilot/pkg/networking/util/util.go, AppendLbEndpointMetadata). No name can hold it.
const separator = ";"

// String is the workload as one text: its values in the order of Labels, without those that are no names.
func (w Workload) String() string { return strings.Join(w.Named().Values(), separator) }

// Named is the workload without the values that Kubernetes would not take as a name of their kind: a namespace is a DNS-1123 label, a
// workload's name and the service that is named after it a DNS-1123 subdomain or a label's value, and all others are labels' values
// (the cluster is one in topology.istio.io/cluster).
func (w Workload) Named() Workload {
	labelValue := func(text string) bool { return len(validation.IsValidLabelValue(text)) == 0 }
	name := func(text string) bool { return labelValue(text) || len(validation.IsDNS1123Subdomain(text)) == 0 }
	namespace := func(text string) bool { return len(validation.IsDNS1123Label(text)) == 0 }
	only := func(value *string, valid func(string) bool) {
		if !valid(*value) {
			*value = ""
		}
	}
	only(&w.Name, name)
	only(&w.Namespace, namespace)
	only(&w.CanonicalService, name)
	for _, value := range []*string{&w.CanonicalRevision, &w.Cluster, &w.App, &w.Version} {
		only(value, labelValue)
	}
	return w
}

// isName reports whether a text may be one of a workload's values: it is empty, or no longer than a DNS-1123 subdomain and of
// the characters that names and labels' values have. It is looser than Named, and quick: there are endpoints by the thousand.
func isName[T string | []byte](text T) bool {
	if len(text) > validation.DNS1123SubdomainMaxLength {
		return false
	}
	for i := range len(text) {
		c := text[i]
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		inside := i > 0 && i < len(text)-1 && (c == '-' || c == '_' || c == '.')
		if !letter && !inside {
			return false
		}
	}
	return true
}

// Values are the workload's values in the order of Labels.
func (w Workload) Values() []string {
	return []string{w.Name, w.Namespace, w.CanonicalService, w.CanonicalRevision, w.Cluster, w.App, w.Version}
}

// Latest is Istio's canonical revision of a workload that has none.
const Latest = "latest"

// Said is Istio's text about an endpoint: a workload without the labels app and version. It is a part of the message that
// holds it, for there are endpoints by the thousand.
type Said [5][]byte

// IsPrincipal reports whether a text is one SPIFFE ID of names
// (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md, section 2, with the capital letters in a trust domain that Istio
// allows), as Istio's are: spiffe://cluster.local/ns/demo/sa/b. A list of them is none.
func IsPrincipal(text string) bool {
	id, ok := strings.CutPrefix(text, "spiffe://")
	domain, path, also := strings.Cut(id, "/")
	if !ok || !also || domain == "" || !isName(domain) {
		return false
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || !isName(segment) {
			return false
		}
	}
	return true
}

// Split takes Istio's text about an endpoint apart. It reports false for a text with more or fewer values, or with one that is no
// name: istiod puts there what the author of a pod wrote into an owner reference.
func Split(text []byte) (s Said, ok bool) {
	last := len(s) - 1
	for i := range last {
		var rest []byte
		if s[i], rest, ok = bytes.Cut(text, []byte(separator)); !ok || !isName(s[i]) {
			return s, false
		}
		text = rest
	}
	s[last] = text
	return s, isName(text)
}

// Namespace is the workload's.
func (s Said) Namespace() []byte { return s[1] }

// LabelsApart is what has to be said of the labels beside it, "app;version", or nothing where they are the canonical service
// and revision, as they are where no one has set these. WithLabels reads it.
func (s Said) LabelsApart(app, version string) string {
	service, revision := s[2], s[3]
	if app == string(service) && (version == string(revision) && version != Latest || version == "" && string(revision) == Latest) {
		return ""
	}
	return app + separator + version
}

// WithLabels is the workload with the labels that LabelsApart said, without labels if that is no such text.
func (w Workload) WithLabels(apart string) Workload {
	if app, version, ok := strings.Cut(apart, separator); ok {
		if isName(app) && isName(version) {
			w.App, w.Version = app, version
		}
		return w
	}
	w.App, w.Version = w.CanonicalService, w.CanonicalRevision
	if w.Version == Latest {
		w.Version = ""
	}
	return w
}

// Parse reads what String wrote, or Istio's shorter text about an endpoint, in which app and version are missing. It
// reports false for anything else: for another number of values, and for a value that is no name.
func Parse(text string) (Workload, bool) {
	values := strings.Split(text, separator)
	const short = 5
	if len(values) != short && len(values) != len(Labels) {
		return Workload{}, false
	}
	for _, value := range values {
		if !isName(value) {
			return Workload{}, false
		}
	}
	values = append(values, "", "")
	return Workload{values[0], values[1], values[2], values[3], values[4], values[5], values[6]}, true
}
