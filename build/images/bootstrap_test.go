package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pmezard/go-difflib/difflib"
)

// Only the address behind the Prometheus port changes in Istio's template.
func TestBootstrap(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio").Output()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "tools", "packaging", "common", "envoy_bootstrap.json"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := withExposition(string(text))
	if err != nil {
		t.Fatal(err)
	}
	diff, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: difflib.SplitLines(string(text)), B: difflib.SplitLines(got), Context: 0,
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = `@@ -250,7 +250 @@
-                "address":{
-                  "socket_address": {
-                    "protocol": "TCP",
-                    "address": "{{ .localhost }}",
-                    "port_value": {{ .config.ProxyAdminPort }}
-                  }
-                }
+                "address":{"pipe": {"path": "./etc/istio/proxy/prometheus.sock"}}
`
	if diff != want {
		t.Errorf("the template changes by\n%s\nwant\n%s", diff, want)
	}
	if _, err := withExposition(got); err == nil {
		t.Error("a template without that address is taken")
	}
}
