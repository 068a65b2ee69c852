// Package workload identifies a workload as Istio's standard metrics do, in a single string, for places that hold only one: a
// certificate, the metadata of an endpoint, a tag of an Envoy statistic.
//
// pkg/mesh/certify writes the string into certificates, pkg/mesh/dialect into Envoy's configuration, and
// pkg/mesh/exposition splits it into labels again.
package workload

import (
	"bytes"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Workload is the sender or receiver of a request. Any field may be empty. Most values are free text from the author of a pod, such as
// owner references and annotations: Named drops those that are not valid names, and String, Parse and Split accept nothing else.
type Workload struct {
	Name              string
	Namespace         string
	CanonicalService  string
	CanonicalRevision string
	Cluster           string
	App               string
	Version           string
}

// Labels are the suffixes of a workload's metric labels, after source_ or destination_, in the order of String.
var Labels = []string{
	"workload", "workload_namespace", "canonical_service", "canonical_revision", "cluster", "app", "version",
}

// separator is Istio's own: the string starts like istiod's value for an endpoint's workload
// (istio.io/istio/pilot/pkg/networking/util/util.go, AppendLbEndpointMetadata). Names cannot contain it.
const separator = ";"

// String returns the workload as one string: its values in the order of Labels, without invalid names.
func (w Workload) String() string { return strings.Join(w.Named().Values(), separator) }

// Named returns the workload without the values that Kubernetes would not accept as names of their kind: a namespace is a DNS-1123
// label, a workload's name and the service named after it are DNS-1123 subdomains or label values, and all others are label values
// (the cluster in topology.istio.io/cluster).
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

// isName reports whether a value can be a name: it is empty, or no longer than a DNS-1123 subdomain and made of
// the characters of names and label values. It is looser and faster than Named, because there are thousands of endpoints.
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

// Values returns the workload's values in the order of Labels.
func (w Workload) Values() []string {
	return []string{w.Name, w.Namespace, w.CanonicalService, w.CanonicalRevision, w.Cluster, w.App, w.Version}
}

// Latest is Istio's canonical revision of a workload without one.
const Latest = "latest"

// Endpoint is Istio's value for an endpoint: a workload without the labels app and version. It references the message that
// contains it, because there are thousands of endpoints.
type Endpoint [5][]byte

// IsPrincipal reports whether a text is exactly one SPIFFE ID made of names
// (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md, section 2, plus the capital letters that Istio allows in a trust
// domain), such as spiffe://cluster.local/ns/demo/sa/b. A list of IDs is not.
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

// Split splits Istio's value for an endpoint. It returns false if the number of parts is wrong or one is not a valid
// name: istiod copies owner references, which are free text from the author of a pod.
func Split(text []byte) (s Endpoint, ok bool) {
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

// Namespace returns the workload's namespace.
func (s Endpoint) Namespace() []byte { return s[1] }

// LabelsApart returns "app;version" if the labels differ from the canonical service and revision, and "" if they do not, as is
// the case unless those are set explicitly. WithLabels reads it.
func (s Endpoint) LabelsApart(app, version string) string {
	service, revision := s[2], s[3]
	if app == string(service) && (version == string(revision) && version != Latest || version == "" && string(revision) == Latest) {
		return ""
	}
	return app + separator + version
}

// WithLabels returns the workload with the labels from LabelsApart, or without labels if the text is malformed.
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

// Parse parses the output of String, or Istio's shorter value for an endpoint, without app and version. It
// returns false for anything else: a wrong number of values, or a value that is not a valid name.
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
