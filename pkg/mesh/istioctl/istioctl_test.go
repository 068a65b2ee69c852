package istioctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"istio.io/istio/pkg/version"
)

var update = flag.Bool("update", false, "write the golden files")

// TestMain sets the version stamps that the build sets in the program.
func TestMain(m *testing.M) {
	version.DockerInfo.Hub, version.DockerInfo.Tag = "registry.example/istio", "1.31.0-test"
	os.Exit(m.Run())
}

// ours reports the images of this build as available.
func ours(_ context.Context, image string) error {
	if slices.Contains([]string{"registry.example/istio/pilot:1.31.0-test", "registry.example/istio/proxyv2:1.31.0-test"}, image) {
		return nil
	}
	return errors.New("this file does not have it")
}

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	root := NewCommand(args, ours)
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.Execute()
	return out.String(), err
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", file, got)
	}
}

func TestProfile(t *testing.T) {
	for name, args := range map[string][]string{
		"profile-list.txt":         {"profile", "list"},
		"profile-dump.yaml":        {"profile", "dump"},
		"profile-dump-demo.yaml":   {"profile", "dump", "demo"},
		"profile-dump-demo.json":   {"profile", "dump", "demo", "-o", "json"},
		"profile-dump-empty.yaml":  {"profile", "dump", "empty"},
		"profile-dump-subtree.txt": {"profile", "dump", "demo", "-p", "components.egressGateways"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			out, err := run(t, args...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, out)
			if strings.HasSuffix(name, ".json") && !json.Valid([]byte(out)) {
				t.Error("no JSON")
			}
		})
	}
	for want, args := range map[string][]string{
		`there is no profile "nosuch"; there are: ambient, default, demo,`: {"profile", "dump", "nosuch"},
		`unknown output format "xml"`:                                      {"profile", "dump", "-o", "xml"},
		"cannot specify both":                                              {"profile", "dump", "demo", "-f", "x.yaml"},
		"nothing at components.nosuch":                                     {"profile", "dump", "-p", "components.nosuch"},
	} {
		if _, err := run(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %s", args, err, want)
		}
	}
}

// The output of `profile dump` is valid input for `install -f`.
func TestDumpIsInput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "demo.yaml")
	out, err := run(t, "profile", "dump", "demo")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err := run(t, "profile", "dump", "-f", file); err != nil || again != out {
		t.Errorf("a dump of the dump differs: %v\n%s", err, again)
	}
}

func TestManifestGenerate(t *testing.T) {
	user := filepath.Join(t.TempDir(), "user.yaml")
	if err := os.WriteFile(user, []byte("kind: IstioOperator\nspec: {values: {pilot: {env: {PILOT_ENABLE_METADATA_EXCHANGE: maybe}}}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const ours = "image: registry.example/istio/pilot:1.31.0-test"
	for name, tc := range map[string]struct {
		args       []string
		have, lack []string
	}{
		"ours": {nil, []string{ours, "PILOT_ENABLE_METADATA_EXCHANGE", "memory: 256Mi"}, nil},
		"Istio's own": {[]string{"--set", "hub=docker.io/istio", "--set", "tag=1.30.0"},
			[]string{"image: docker.io/istio/pilot:1.30.0", "memory: 2048Mi"}, []string{"PILOT_ENABLE_METADATA_EXCHANGE", "registry.example"}},
		"a mirror": {[]string{"--set", "hub=my-registry.local/istio"},
			[]string{"image: my-registry.local/istio/pilot:1.31.0-test", "PILOT_ENABLE_METADATA_EXCHANGE"}, nil},
		"the user's file": {[]string{"-f", user}, []string{ours, "value: maybe"}, nil},
		"the user's flag": {[]string{"--set", "values.pilot.env.PILOT_ENABLE_METADATA_EXCHANGE=maybe"}, []string{ours, "value: maybe"}, nil},
		"a revision":      {[]string{"-r", "canary"}, []string{ours, "name: istiod-canary", "PILOT_ENABLE_METADATA_EXCHANGE"}, nil},
		"demo":            {[]string{"--set", "profile=demo"}, []string{ours, "name: istio-egressgateway", "memory: 100Mi"}, []string{"256Mi"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, append([]string{"manifest", "generate"}, tc.args...)...)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range tc.have {
				if !strings.Contains(out, s) {
					t.Errorf("without %q", s)
				}
			}
			for _, s := range tc.lack {
				if strings.Contains(out, s) {
					t.Errorf("with %q", s)
				}
			}
		})
	}
}

// All commands used in the guide exist, and those with our values still have the flag that is used for them.
func TestCommands(t *testing.T) {
	root := NewCommand(nil, ours)
	for _, path := range []string{
		"analyze", "authz", "bug-report", "dashboard kiali", "experimental precheck", "x precheck", "install", "kube-inject",
		"manifest generate", "profile dump", "profile list", "proxy-config all", "proxy-status", "tag set", "uninstall",
		"upgrade", "validate", "version", "x describe", "waypoint apply",
	} {
		c, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 {
			t.Errorf("istioctl %s does not exist: %v", path, err)
		} else if slices.Contains([]string{"install", "upgrade", "manifest generate"}, path) && lookup(c, "filename") != "stringSlice" {
			t.Errorf("istioctl %s has no list flag --filename", path)
		}
	}
}

func lookup(c *cobra.Command, flag string) string {
	if f := c.PersistentFlags().Lookup(flag); f != nil {
		return f.Value.Type()
	}
	if f := c.InheritedFlags().Lookup(flag); f != nil {
		return f.Value.Type()
	}
	return ""
}

// An installation is refused with a list of all missing images.
func TestMissingImages(t *testing.T) {
	for name, c := range map[string]struct{ sets, missing []string }{
		"ours":            {nil, nil},
		"demo":            {[]string{"profile=demo"}, nil},
		"a revision":      {[]string{"revision=canary"}, nil},
		"no sidecars":     {[]string{"profile=empty"}, nil},
		"ambient":         {[]string{"profile=ambient"}, []string{"install-cni:1.31.0-test-distroless", "pilot:1.31.0-test-distroless", "ztunnel:1.31.0-test-distroless"}},
		"a variant":       {[]string{"values.global.variant=distroless"}, []string{"pilot:1.31.0-test-distroless", "proxyv2:1.31.0-test-distroless"}},
		"another hub":     {[]string{"hub=hub.example"}, []string{"hub.example/pilot:1.31.0-test", "hub.example/proxyv2:1.31.0-test"}},
		"another tag":     {[]string{"tag=1.30.0"}, []string{"pilot:1.30.0", "proxyv2:1.30.0"}},
		"another sidecar": {[]string{"values.global.proxy.image=hub.example/p:1"}, []string{"hub.example/p:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkImages(t.Context(), ours, nil, append([]string{"hub=registry.example/istio", "tag=1.31.0-test"}, c.sets...))
			if len(c.missing) == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("the installation is not refused")
			}
			for _, image := range c.missing {
				if !strings.Contains(err.Error(), image+": this file does not have it\n") {
					t.Errorf("without %s: %v", image, err)
				}
			}
			if n := strings.Count(err.Error(), "does not have it"); n != len(c.missing) {
				t.Errorf("%d images are missing: %v", n, err)
			}
		})
	}
	for _, path := range []string{"install", "upgrade"} {
		if c, _, err := NewCommand(nil, ours).Find([]string{path}); err != nil || c.Flags().Lookup(skipImageCheck) == nil {
			t.Errorf("istioctl %s has no --%s: %v", path, skipImageCheck, err)
		}
	}
}
