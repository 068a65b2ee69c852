package deploy

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"istio.io/istio/pkg/config/analysis/analyzers"
	"istio.io/istio/pkg/config/analysis/diag"
	"istio.io/istio/pkg/config/analysis/local"
	"istio.io/istio/pkg/config/resource"
	"istio.io/istio/pkg/kube"

	"polymesh.dev/polymesh/pkg/diagnose"
)

// istioNamespace is where Istio's control plane is.
const istioNamespace = "istio-system"

// analyze has Istio's own analyzers (`istioctl analyze`) look at the manifests together with the cluster, before anything is
// applied: a route to a host that nobody serves, a Gateway whose selector matches no pod, policies that contradict each
// other. What they find is shown and does not stop a deploy; the API server and istiod's webhook refuse what is invalid.
func (d *deployment) analyze(ctx context.Context) error {
	if !d.cluster.istio {
		return nil
	}
	step := d.Steps.Start("check the manifests")
	client, err := kube.NewCLIClient(kube.NewClientConfigForRestConfig(d.cluster.rest))
	if err != nil {
		step.Fail()
		return fmt.Errorf("check the manifests: %w", err)
	}
	analyzer := local.NewIstiodAnalyzer(analyzers.AllCombined(), resource.Namespace(d.Project.Namespace), istioNamespace, nil)
	analyzer.AddRunningKubeSourceWithRevision(kube.EnableCrdWatcher(client), "", false)
	var readers []local.ReaderSource
	files := d.files()
	for _, name := range files {
		text, err := os.ReadFile(filepath.Join(d.Project.Dir, name))
		if err != nil {
			step.Fail()
			return err
		}
		readers = append(readers, local.ReaderSource{Name: name, Reader: bytes.NewReader(text)})
	}
	// AddReaderKubeSource would leave Services and pods out, which are in the manifests and not yet in the cluster.
	if err := analyzer.AddTestReaderKubeSource(readers); err != nil {
		step.Fail()
		return fmt.Errorf("check the manifests: %w", err)
	}
	// The analyzers end with a channel.
	found, err := analyzer.Analyze(ctx.Done())
	if err != nil {
		step.Fail()
		return fmt.Errorf("check the manifests: %w", err)
	}
	for _, m := range found.Messages {
		if finding, ok := d.fromAnalyzer(m, files); ok {
			d.result.Findings = append(d.result.Findings, finding)
		}
	}
	for _, c := range d.imagePullAlways() {
		d.result.Findings = append(d.result.Findings, diagnose.Finding{Reason: diagnose.ImagePull, Object: c.object.ID(),
			Message: "imagePullPolicy Always asks a registry for an image that was loaded into this node", Advice: "leave the policy out", At: c.object.At(append(slices.Clone(c.path), "imagePullPolicy")...)})
	}
	if n := len(d.result.Findings); n > 0 {
		step.Done("%d to look at, see below", n)
	} else {
		step.Done("")
	}
	return nil
}

// files are the files of the manifests.
func (d *deployment) files() []string {
	var names []string
	for _, o := range d.objects {
		if o.File != "" && !slices.Contains(names, o.File) {
			names = append(names, o.File)
		}
	}
	return names
}

// fromAnalyzer takes what an analyzer says of the project's own manifests, warnings and errors.
func (d *deployment) fromAnalyzer(m diag.Message, files []string) (diagnose.Finding, bool) {
	if m.Resource == nil || m.Type.Level() == diag.Info {
		return diagnose.Finding{}, false
	}
	at := ""
	if m.Resource.Origin.Reference() != nil {
		at = m.Resource.Origin.Reference().String()
	}
	file, _, _ := strings.Cut(at, ":")
	if !slices.Contains(files, file) {
		return diagnose.Finding{}, false
	}
	if m.Line > 0 {
		at = fmt.Sprintf("%s:%d", file, m.Line)
	}
	f := diagnose.Finding{Reason: diagnose.GatewayMismatch, Object: m.Resource.Origin.FriendlyName(), At: at,
		Message: fmt.Sprintf(m.Type.Template(), m.Parameters...), Advice: fmt.Sprintf("Istio's check %s explains it", m.Type.Code())}
	if m.Line == 0 && at == "" {
		f.At = file
	}
	if strings.Contains(f.Message, "mTLS") || strings.Contains(f.Message, "mutual TLS") {
		f.Reason = diagnose.MTLSMismatch
	}
	return f, true
}
