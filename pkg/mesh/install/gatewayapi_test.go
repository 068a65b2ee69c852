package install

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestDecideGatewayAPI(t *testing.T) {
	want := Bundle{"v1.6.0", "experimental"}
	older, newer := Bundle{"v1.5.1", "experimental"}, Bundle{"v1.10.0", "experimental"}
	ours := func(b Bundle) GatewayCRD { return GatewayCRD{"gateways.gateway.networking.k8s.io", b, true} }
	users := func(b Bundle) GatewayCRD { return GatewayCRD{"httproutes.gateway.networking.k8s.io", b, false} }
	for _, tc := range []struct {
		name     string
		recorded string
		live     []GatewayCRD
		action   Action
		reason   string
	}{
		{"empty cluster", "", nil, Install, "none"},
		{"killed in the first installation", "", []GatewayCRD{ours(want)}, Finish, "interrupted"},
		{"killed in the first installation, then a newer build", "", []GatewayCRD{ours(older)}, Finish, "interrupted"},
		{"restart", want.String(), []GatewayCRD{ours(want)}, Keep, ""},
		{"restart after the user replaced them", want.String(), []GatewayCRD{users(older)}, Keep, ""},
		{"restart after the user removed them", want.String(), nil, Keep, ""},
		{"newer build", older.String(), []GatewayCRD{ours(older)}, Upgrade, "from v1.5.1 experimental to v1.6.0"},
		{"killed in an upgrade", older.String(), []GatewayCRD{ours(older), ours(want)}, Upgrade, ""},
		{"newer build after the user removed them", older.String(), nil, Leave, "removed"},
		{"newer build after the user replaced one", older.String(), []GatewayCRD{ours(older), users(older)}, Leave, "httproutes.gateway.networking.k8s.io v1.5.1"},
		{"older build", newer.String(), []GatewayCRD{ours(newer)}, Leave, "newer than v1.6.0"},
		{"user's, older", "", []GatewayCRD{users(older)}, Leave, "user"},
		{"user's, newer", "", []GatewayCRD{users(newer)}, Leave, "user"},
		{"user's, of the same version", "", []GatewayCRD{users(want)}, Leave, "user"},
		{"user's, of another channel", "", []GatewayCRD{users(Bundle{"v1.6.0", "standard"})}, Leave, "standard"},
		{"user's, without annotations", "", []GatewayCRD{users(Bundle{})}, Leave, "httproutes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := DecideGatewayAPI(tc.recorded, tc.live, want)
			if d.Action != tc.action || !strings.Contains(d.Reason, tc.reason) {
				t.Errorf("got %s (%s), want %s (...%s...)", d.Action, d.Reason, tc.action, tc.reason)
			}
		})
	}
}

func TestOnlyOurs(t *testing.T) {
	const (
		whole  = `{"f:metadata":{"f:annotations":{"f:gateway.networking.k8s.io/bundle-version":{}}},"f:spec":{"f:group":{}}}`
		status = `{"f:status":{"f:conditions":{}}}`
		note   = `{"f:metadata":{"f:annotations":{"f:example.com/note":{}},"f:labels":{"f:example.com/team":{}}}}`
	)
	entry := func(manager string, operation metav1.ManagedFieldsOperationType, fields string) metav1.ManagedFieldsEntry {
		return metav1.ManagedFieldsEntry{Manager: manager, Operation: operation, FieldsV1: metav1.NewFieldsV1(fields)}
	}
	const apply, update = metav1.ManagedFieldsOperationApply, metav1.ManagedFieldsOperationUpdate
	ours := entry(ownManager, apply, whole)
	for name, tc := range map[string]struct {
		managed []metav1.ManagedFieldsEntry
		want    bool
	}{
		"as applied, with the API server's status":   {[]metav1.ManagedFieldsEntry{ours, entry("kube-apiserver", update, status)}, true},
		"with a label and an annotation of the user": {[]metav1.ManagedFieldsEntry{ours, entry("kubectl-label", update, note)}, true},
		"kubectl create":                       {[]metav1.ManagedFieldsEntry{entry("kubectl-create", update, whole)}, false},
		"kubectl apply over ours":              {[]metav1.ManagedFieldsEntry{ours, entry("kubectl-client-side-apply", update, whole)}, false},
		"kubectl apply --server-side":          {[]metav1.ManagedFieldsEntry{ours, entry("kubectl", apply, whole)}, false},
		"another field of the spec":            {[]metav1.ManagedFieldsEntry{ours, entry("kubectl-edit", update, `{"f:spec":{"f:versions":{}}}`)}, false},
		"another version":                      {[]metav1.ManagedFieldsEntry{ours, entry("kubectl-edit", update, `{"f:metadata":{"f:annotations":{"f:gateway.networking.k8s.io/channel":{}}}}`)}, false},
		"what a user has deployed":             {[]metav1.ManagedFieldsEntry{entry("polymesh", apply, whole)}, false},
		"deployed over ours":                   {[]metav1.ManagedFieldsEntry{ours, entry("polymesh", apply, whole)}, false},
		"an update under our own name":         {[]metav1.ManagedFieldsEntry{entry(ownManager, update, whole)}, false},
		"an API server without managed fields": {nil, false},
	} {
		got, err := onlyOurs(tc.managed)
		if err != nil || got != tc.want {
			t.Errorf("%s: got %v, %v; want %v", name, got, err, tc.want)
		}
	}
}

// The build joins the files of the pinned module; this reads them one by one.
func TestReadGatewayAPI(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		t.Fatal(err)
	}
	crds := filepath.Join(strings.TrimSpace(string(dir)), "config", "crd")
	objects, err := readGatewayAPI(filepath.Join(crds, gatewayAPI.Channel, "gateway.networking.k8s.io_httproutes.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) != 1 || objects[0].GetName() != "httproutes.gateway.networking.k8s.io" {
		t.Errorf("the file with HTTPRoute holds %d objects: %v", len(objects), objects)
	}
	for file, says := range map[string]string{
		"standard/gateway.networking.k8s.io_httproutes.yaml":                    "v1.6.0 standard",
		gatewayAPI.Channel + "/gateway.networking.k8s.io_vap_safeupgrades.yaml": "ValidatingAdmissionPolicy",
		"none.yaml": "no such file",
	} {
		if _, err := readGatewayAPI(filepath.Join(crds, file)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want ...%s...", file, err, says)
		}
	}
}
