package deploy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
)

// What the API server warns of is shown once for each object, with characters that turn the text around (U+202E) escaped;
// those that command a terminal do not get through HTTP.
func TestWarnings(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Add("Warning", `299 - "not enforced"`)
		w.Header().Add("Warning", "299 - \"red \u202edet\"")
		fmt.Fprint(w, `{"kind": "Namespace", "apiVersion": "v1"}`)
	}))
	defer api.Close()
	var out strings.Builder
	d := &deployment{Options: Options{Steps: progress.New(&out)}}
	client, err := kubernetes.NewForConfig(&rest.Config{Host: api.URL, WarningHandler: cluster.Warnings(d.warn)})
	if err != nil {
		t.Fatal(err)
	}
	get := func() {
		t.Helper()
		if _, err := client.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []string{"k8s/a.yaml:1", "k8s/b.yaml:7"} {
		end := d.applying(at)
		get()
		get()
		end()
	}
	get()
	const want = `k8s/a.yaml:1: warning: not enforced
k8s/a.yaml:1: warning: red \u202edet
k8s/b.yaml:7: warning: not enforced
k8s/b.yaml:7: warning: red \u202edet
warning: not enforced
warning: red \u202edet
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}
