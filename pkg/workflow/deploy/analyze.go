package deploy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"istio.io/istio/pkg/config/analysis/analyzers"
	"istio.io/istio/pkg/config/analysis/diag"
	"istio.io/istio/pkg/config/analysis/local"
	"istio.io/istio/pkg/config/analysis/msg"
	"istio.io/istio/pkg/config/resource"
	"istio.io/istio/pkg/kube"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// istioNamespace is where Istio's control plane is.
const istioNamespace = "istio-system"

// analyze runs Istio's own analyzers (`istioctl analyze`) on the manifests together with the cluster, before anything is applied:
// they find a route to a host that does not exist, a Gateway whose selector matches no pod, policies that contradict each other.
// The findings are shown and do not stop a deploy; the API server and istiod's webhook reject what is invalid.
func (d *deployment) analyze(ctx context.Context) error {
	if !d.cluster.Istio {
		return nil
	}
	return d.Steps.Do("check the manifests", func(*progress.Step) (string, error) {
		if err := d.runAnalyzers(ctx); err != nil {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			// The API server may accept what Istio's reader does not; if not, its message is better.
			d.result.Findings = append(d.result.Findings, diagnose.Finding{Reason: diagnose.Istio, Object: "project " + d.Project.Name,
				Message: "Istio's checks are not complete: " + readable(err.Error()), Advice: "nothing, if the deploy succeeds"})
		}
		plain, err := d.plainText(ctx)
		if err != nil {
			return "", err
		}
		d.result.Findings = append(d.result.Findings, plain...)
		if n := len(d.result.Findings); n > 0 {
			return fmt.Sprintf("%d findings, see below", n), nil
		}
		return "", nil
	})
}

// runAnalyzers runs the analyzers on the manifests and the cluster.
func (d *deployment) runAnalyzers(ctx context.Context) error {
	client, err := kube.NewCLIClient(kube.NewClientConfigForRestConfig(d.cluster.REST))
	if err != nil {
		return err
	}
	analyzer := local.NewIstiodAnalyzer(analyzers.AllCombined(), resource.Namespace(d.Project.Namespace), istioNamespace, nil)
	analyzer.AddRunningKubeSourceWithRevision(kube.EnableCrdWatcher(client), "", false)
	sources, err := d.sources()
	if err != nil {
		return err
	}
	return d.analyzeSources(ctx, analyzer, sources)
}

// analyzeSources adds what the analyzers find in the manifests.
func (d *deployment) analyzeSources(ctx context.Context, analyzer *local.IstiodAnalyzer, sources []local.ReaderSource) error {
	// AddReaderKubeSource would omit Services and pods, which are in the manifests and not yet in the cluster. This one adds what
	// it can read; the error is about the rest.
	unread := analyzer.AddTestReaderKubeSource(sources)
	// The analyzers end when this channel is closed.
	found, err := analyzer.Analyze(ctx.Done())
	if err != nil {
		return errors.Join(unread, err)
	}
	for _, m := range found.Messages {
		if finding, ok := d.fromAnalyzer(m, found.Messages); ok {
			d.result.Findings = append(d.result.Findings, finding)
		}
	}
	return unread
}

// sources returns the files of the manifests, and the pods that they will have.
func (d *deployment) sources() ([]local.ReaderSource, error) {
	var sources []local.ReaderSource
	for _, name := range d.files() {
		text, err := os.ReadFile(filepath.Join(d.Project.Dir, name))
		if err != nil {
			return nil, err
		}
		sources = append(sources, local.ReaderSource{Name: name, Reader: bytes.NewReader(text)})
	}
	pods, err := d.futurePods()
	if err != nil {
		return nil, err
	}
	return append(sources, local.ReaderSource{Name: futurePods, Reader: bytes.NewReader(pods)}), nil
}

// futurePods is the name of the source that is not a file of the project.
const futurePods = "pods of the manifests"

// futurePods returns the pods that the manifests' workloads will have, as YAML: without them the subsets of a DestinationRule that
// comes with its Deployment select no pod. They contain only what analyzers use to select pods.
func (d *deployment) futurePods() ([]byte, error) {
	var all bytes.Buffer
	for _, o := range d.objects {
		if !diagnose.IsWorkload(o.GroupVersionKind().GroupKind()) {
			continue
		}
		labels, found, err := unstructured.NestedStringMap(o.Object, "spec", "template", "metadata", "labels")
		if err != nil || !found {
			continue // the API server will reject it
		}
		text, err := yaml.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "spec": map[string]any{}, "metadata": map[string]any{
			"name": o.GetName(), "namespace": cmp.Or(o.GetNamespace(), d.Project.Namespace), "labels": labels}})
		if err != nil {
			return nil, err
		}
		all.WriteString("---\n")
		all.Write(text)
	}
	return all.Bytes(), nil
}

// files returns the files of the manifests.
func (d *deployment) files() []string {
	var names []string
	for _, o := range d.objects {
		if o.File != "" && !slices.Contains(names, o.File) {
			names = append(names, o.File)
		}
	}
	return names
}

// fromAnalyzer returns the finding for an analyzer's warning or error about the project's own manifests.
func (d *deployment) fromAnalyzer(m diag.Message, all diag.Messages) (diagnose.Finding, bool) {
	if m.Resource == nil || m.Type.Level() == diag.Info || m.Resource.Origin.Reference() == nil {
		return diagnose.Finding{}, false
	}
	// A manifest's position is file:line; an object in the cluster has no file.
	file, _, _ := strings.Cut(m.Resource.Origin.Reference().String(), ":")
	i := slices.IndexFunc(d.objects, func(o project.Object) bool {
		return o.File == file && o.GetName() == m.Resource.Metadata.FullName.Name.String() && o.GetKind() == m.Resource.Metadata.Schema.Kind()
	})
	if i < 0 || file == "" {
		return diagnose.Finding{}, false
	}
	o := d.objects[i]
	// A Gateway that does not exist has no hosts either.
	if m.Type.Code() == msg.VirtualServiceHostNotFoundInGateway.Code() && slices.ContainsFunc(all, func(other diag.Message) bool {
		return other.Type.Code() == msg.ReferencedResourceNotFound.Code() && other.Parameters[0] == "gateway" && other.Resource != nil &&
			other.Resource.Metadata.FullName == m.Resource.Metadata.FullName
	}) {
		return diagnose.Finding{}, false
	}
	reason, advice, path := explain(o, m)
	f := diagnose.Finding{Reason: reason, Object: o.ID(), Message: fmt.Sprintf(m.Type.Template(), m.Parameters...), Advice: advice, At: o.At(path...)}
	if path == nil && m.Line > 0 {
		f.At = fmt.Sprintf("%s:%d", file, m.Line)
	}
	return f, true
}

// explain returns the reason for a message, what to do, and which field to change.
func explain(o project.Object, m diag.Message) (reason diagnose.Reason, advice string, path []string) {
	parameter := func(i int) string {
		if i < len(m.Parameters) {
			return fmt.Sprint(m.Parameters[i])
		}
		return ""
	}
	switch m.Type.Code() {
	case msg.ReferencedResourceNotFound.Code():
		what, name := parameter(0), parameter(1)
		switch what {
		case "gateway":
			return diagnose.GatewayMismatch, "create the Gateway, or correct its name (one of another namespace is NAMESPACE/NAME)", find(o.Object, "gateways", name)
		case "selector":
			return diagnose.GatewayMismatch, "no pod has these labels, so nothing serves this Gateway: Istio's own has istio: ingressgateway (`kubectl get pods -A -l istio --show-labels`)", []string{"spec", "selector"}
		case "host", "mirror host":
			return diagnose.GatewayMismatch, "create a Service or ServiceEntry of this name, or correct the host (one of another namespace is NAME.NAMESPACE)", find(o.Object, "host", name)
		case "host+subset in destinationrule", "mirror+subset in destinationrule":
			host, subset, _ := strings.Cut(name, "+")
			return diagnose.GatewayMismatch, fmt.Sprintf("add the subset %s to a DestinationRule of %s, or correct its name", subset, host), find(o.Object, "subset", subset)
		case "credentialName":
			return diagnose.GatewayMismatch, "create the Secret in the namespace of the gateway's pods (`kubectl create secret tls`), or correct its name", find(o.Object, "credentialName", name)
		}
	case msg.VirtualServiceHostNotFoundInGateway.Code():
		return diagnose.GatewayMismatch, "let servers.hosts of the Gateway and hosts of the VirtualService name the same host", []string{"spec", "hosts"}
	case msg.GatewayPortNotDefinedOnService.Code():
		return diagnose.GatewayMismatch, "use a port of the gateway's Service (`kubectl get service -A -l istio`), or add this one to it", find(o.Object, "number", parameter(0))
	case msg.InvalidGatewayCredential.Code():
		return diagnose.GatewayMismatch, "create the Secret again with a certificate and its key (`kubectl create secret tls`)", find(o.Object, "credentialName", "")
	case msg.ConflictingGateways.Code():
		return diagnose.GatewayMismatch, "two Gateways serve the same host on the same port: merge them, or separate the hosts", find(o.Object, "hosts", "")
	case msg.UnknownDestinationRuleHost.Code():
		return diagnose.GatewayMismatch, "no Service or ServiceEntry has this name: correct the host", []string{"spec", "host"}
	case msg.DestinationRuleSubsetNotSelectPods.Code():
		return diagnose.GatewayMismatch, "no pod has the labels of this subset: requests to it get 503. Correct its labels, or those of the pods", append(parent(find(o.Object, "name", parameter(0))), "labels")
	}
	return diagnose.Istio, "https://istio.io/latest/docs/reference/config/analysis/" + strings.ToLower(m.Type.Code()) + "/ describes what to do", nil
}

// find returns the path of the first field of this name, at any depth, that is value or a list with it, or any value if it is
// empty.
func find(at any, name, value string) []string {
	switch at := at.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(at)) {
			if list, ok := at[key].([]any); ok && key == name {
				if i := slices.IndexFunc(list, func(item any) bool { return fmt.Sprint(item) == value }); i >= 0 {
					return []string{key, fmt.Sprint(i)}
				}
			}
			if key == name && (value == "" || fmt.Sprint(at[key]) == value) {
				return []string{key}
			}
			if key == "metadata" {
				continue
			}
			if rest := find(at[key], name, value); rest != nil {
				return append([]string{key}, rest...)
			}
		}
	case []any:
		for i, item := range at {
			if rest := find(item, name, value); rest != nil {
				return append([]string{fmt.Sprint(i)}, rest...)
			}
		}
	}
	return nil
}

func parent(path []string) []string { return path[:max(0, len(path)-1)] }
