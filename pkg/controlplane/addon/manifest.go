package addon

import (
	"bufio"
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"text/template"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
)

//go:embed manifests/*.yaml
var manifests embed.FS

// kind is a kind of object that manifests may contain.
type kind struct {
	schema.GroupVersionKind
	resource   string
	namespaced bool
}

// kinds returns all kinds of which an add-on has objects, or had in an earlier version. They are built into the API server, so
// no discovery is needed. Pruning searches each of them for an add-on's objects: never remove a row.
func kinds() []kind {
	row := func(group, version, name, resource string, namespaced bool) kind {
		return kind{schema.GroupVersionKind{Group: group, Version: version, Kind: name}, resource, namespaced}
	}
	const rbac, admission = "rbac.authorization.k8s.io", "admissionregistration.k8s.io"
	return []kind{
		row(admission, "v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", false),
		row(admission, "v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", false),
		row("", "v1", "ServiceAccount", "serviceaccounts", true),
		row("", "v1", "ConfigMap", "configmaps", true),
		row("", "v1", "Service", "services", true),
		row(rbac, "v1", "Role", "roles", true),
		row(rbac, "v1", "RoleBinding", "rolebindings", true),
		row(rbac, "v1", "ClusterRole", "clusterroles", false),
		row(rbac, "v1", "ClusterRoleBinding", "clusterrolebindings", false),
		row("apps", "v1", "Deployment", "deployments", true),
		row("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
		row("storage.k8s.io", "v1", "StorageClass", "storageclasses", false),
		row("apiregistration.k8s.io", "v1", "APIService", "apiservices", false),
	}
}

// mainImage returns the short name of the image whose version is the add-on's.
func mainImage(name config.Addon) string {
	switch name {
	case config.LocalStorage:
		return "local-path-provisioner"
	case ObserveAccess:
		return "forward"
	}
	return string(name)
}

// kubeletAuthority reads the CA in KubeletCA; it is empty if the file does not exist yet.
func (o Options) kubeletAuthority() (string, error) {
	text, err := os.ReadFile(o.KubeletCA)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(text), err
}

// inputs are what manifests depend on that can change while the server runs.
type inputs struct {
	// Resolvers is a hash of the name servers that pods get from the servers' machines: see nameserversOf.
	Resolvers string
	// KubeletAuthority is the CA of the kubelets' serving certificates, as PEM.
	KubeletAuthority string
	// Hosts are the nodes' names and addresses, sorted by name.
	Hosts []host
	// Spread is whether pods can run on at least two nodes.
	Spread bool
	// Scaled is whether the number of replicas is a user's.
	Scaled bool
	// Rivals are the users' programs that `istioctl dashboard` finds by the same labels as ours: names of dashboards().
	Rivals []string
}

// Rival reports whether a program is among Rivals.
func (i inputs) Rival(name string) bool { return slices.Contains(i.Rivals, name) }

func (i inputs) equal(other inputs) bool {
	return i.Resolvers == other.Resolvers && i.KubeletAuthority == other.KubeletAuthority &&
		slices.Equal(i.Hosts, other.Hosts) && i.Spread == other.Spread && i.Scaled == other.Scaled && slices.Equal(i.Rivals, other.Rivals)
}

// render returns the add-on's objects in the order in which they are applied; none if it is disabled.
func render(opts Options, in inputs) ([]*unstructured.Unstructured, error) {
	if opts.Disabled {
		return nil, nil
	}
	file := string(opts.Name) + ".yaml"
	tmpl, err := template.New(file).Funcs(template.FuncMap{
		"image": opts.Image,
		// cel returns a text as a string literal of CEL, whose escapes are those of Go.
		"cel": strconv.Quote,
		"json": func(v any) (string, error) {
			text, err := json.Marshal(v)
			return string(text), err
		},
	}).ParseFS(manifests, "manifests/"+file)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	data := struct {
		Options
		inputs
		Group int // of the store's sockets
	}{opts, in, layout.ObserveGroup}
	if err := tmpl.Execute(&text, data); err != nil {
		return nil, err
	}

	known := make(map[schema.GroupVersionKind]bool)
	for _, k := range kinds() {
		known[k.GroupVersionKind] = true
	}
	var objects []*unstructured.Unstructured
	for docs := utilyaml.NewYAMLReader(bufio.NewReader(&text)); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		text, err := yaml.YAMLToJSONStrict(doc)
		if err != nil {
			return nil, err
		}
		obj := &unstructured.Unstructured{}
		if err := obj.UnmarshalJSON(text); err != nil {
			return nil, err
		}
		if !known[obj.GroupVersionKind()] {
			return nil, fmt.Errorf("%s %s: pruning does not know this kind", obj.GroupVersionKind(), obj.GetName())
		}
		labels := obj.GetLabels()
		if labels == nil {
			labels = make(map[string]string)
		}
		labels[nameLabel] = string(opts.Name)
		obj.SetLabels(labels)
		objects = append(objects, obj)
	}
}
