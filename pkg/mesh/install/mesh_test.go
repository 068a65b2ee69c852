package install

import (
	"cmp"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"istio.io/istio/operator/pkg/render"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden files")

var testImages = Images{Hub: "registry.example/istio", Tag: "1.31.0-test"}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", file, got)
	}
}

func TestSettingsOfProfiles(t *testing.T) {
	for _, profile := range []string{"default", "demo", "minimal", "empty"} {
		t.Run(profile, func(t *testing.T) {
			s := settings{images: testImages, profile: profile}
			overlay, err := Overlay(s.images, nil, s.sets())
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "overlay-"+profile+".yaml", overlay)

			files, done, err := Input(s.images, nil, s.sets(), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer done()
			merged, err := render.MergeInputs(files, s.sets(), nil)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "operator-"+profile+".yaml", []byte(merged.YAML()))

			sets, _, err := s.manifests(nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, set := range sets {
				for _, m := range set.Manifests {
					if recorded(object{m.Unstructured, set.Component}) {
						names = append(names, display(objectKey(m.GroupVersionKind(), m.GetNamespace(), m.GetName())))
					}
				}
			}
			for _, set := range sets {
				for _, m := range set.Manifests {
					switch kind := m.GroupVersionKind(); kind {
					case deploymentKind:
						if _, found, err := unstructured.NestedSlice(m.Object, "spec", "template", "spec", "affinity", "podAntiAffinity", "preferredDuringSchedulingIgnoredDuringExecution"); !found || err != nil {
							t.Errorf("the replicas of %s need not be on different nodes: %v", m.GetName(), err)
						}
						if _, found, _ := unstructured.NestedFieldNoCopy(m.Object, "spec", "replicas"); found {
							t.Errorf("Istio's installer owns the replicas of %s: they would count as changed by the user", m.GetName())
						}
					case autoscalerKind:
						if _, found, _ := unstructured.NestedFieldNoCopy(m.Object, "spec", "minReplicas"); found {
							t.Errorf("Istio's installer owns the minimum of %s", m.GetName())
						}
					case budgetKind:
						t.Errorf("a profile has a PodDisruptionBudget, %s", m.GetName())
					}
				}
			}
			if got, want := hasIngress(sets), profile == "default" || profile == "demo"; got != want {
				t.Errorf("has an ingress gateway: %v, want %v", got, want)
			}
			if profile == "empty" && len(names) > 0 {
				t.Errorf("the empty profile installs %v", names)
			}
		})
	}
}

// Every profile with a control plane has the provider of traces, in the domain of the cluster, beside those that the profile has.
func TestProviderOfTraces(t *testing.T) {
	for profile, others := range map[string]int{"default": 0, "minimal": 0, "demo": 3} {
		for _, domain := range []string{"", "cluster.local", "example.internal"} {
			providers := meshProviders(t, settings{images: testImages, profile: profile, clusterDomain: domain}, nil)
			want := map[string]any{"service": "jaeger-collector.istio-system.svc." + cmp.Or(domain, "cluster.local"), "port": float64(4317)}
			if got := providers["jaeger"]["opentelemetry"]; !reflect.DeepEqual(got, want) || len(providers) != 1+others {
				t.Errorf("%s in %q: the providers are %v", profile, domain, providers)
			}
		}
	}
	// A list of the user's is left as it is.
	for _, set := range []string{"meshConfig.extensionProviders[0].name=mine", "values.meshConfig.extensionProviders[0].name=mine"} {
		providers := meshProviders(t, settings{images: testImages, profile: "default"}, []string{set, strings.Replace(set, ".name=mine", ".zipkin.service=z", 1), strings.Replace(set, ".name=mine", ".zipkin.port=9411", 1)})
		if want := map[string]map[string]any{"mine": {"name": "mine", "zipkin": map[string]any{"service": "z", "port": float64(9411)}}}; !reflect.DeepEqual(providers, want) {
			t.Errorf("%s: the providers are %v", set, providers)
		}
	}
}

// meshProviders returns the extension providers in the mesh configuration that istiod reads.
func meshProviders(t *testing.T, s settings, sets []string) map[string]map[string]any {
	t.Helper()
	sets = append(s.sets(), sets...)
	files, done, err := Input(s.images, nil, sets, strings.NewReader(""))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	all, _, err := render.GenerateManifest(files, sets, false, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	providers := map[string]map[string]any{}
	for _, set := range all {
		for _, m := range set.Manifests {
			if m.GetKind() != "ConfigMap" || m.GetName() != "istio" {
				continue
			}
			var mesh struct{ ExtensionProviders []map[string]any }
			text, _, _ := unstructured.NestedString(m.Object, "data", "mesh")
			if err := yaml.Unmarshal([]byte(text), &mesh); err != nil {
				t.Fatal(err)
			}
			for _, p := range mesh.ExtensionProviders {
				providers[fmt.Sprint(p["name"])] = p
			}
		}
	}
	return providers
}

func TestOverlayOnlyForOurImages(t *testing.T) {
	for _, tc := range []struct {
		name string
		sets []string
		want bool
	}{
		{"ours", []string{"hub=registry.example/istio", "tag=1.31.0-test"}, true},
		{"ours, mirrored", []string{"hub=mirror.example/istio", "tag=1.31.0-test"}, true},
		{"ours, another version", []string{"hub=registry.example/istio", "tag=1.32.0"}, true},
		{"ours, by values", []string{"values.global.hub=registry.example/istio", "values.global.tag=x"}, true},
		{"Istio's", []string{"hub=docker.io/istio", "tag=1.30.0"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			overlay, err := Overlay(testImages, nil, tc.sets)
			if err != nil {
				t.Fatal(err)
			}
			if got := overlay != nil; got != tc.want {
				t.Errorf("overlay: %v, want %v", got, tc.want)
			}
		})
	}
	t.Run("not stamped", func(t *testing.T) {
		overlay, err := Overlay(Images{Hub: "unknown", Tag: "unknown"}, nil, []string{"hub=unknown", "tag=unknown"})
		if err != nil || overlay != nil {
			t.Errorf("overlay %s, error %v", overlay, err)
		}
	})
}

func TestUsersSettingsWin(t *testing.T) {
	stdin := `
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec:
  components:
    pilot:
      k8s:
        hpaSpec: {maxReplicas: 3}
  values:
    pilot:
      env: {PILOT_ENABLE_METADATA_EXCHANGE: "true", OTHER: "1"}
`
	sets := append(settings{images: testImages, profile: "default"}.sets(), "values.pilot.resources.requests.memory=1Gi")
	files, done, err := Input(testImages, []string{"-"}, sets, strings.NewReader(stdin))
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	merged, err := render.MergeInputs(files, sets, nil)
	if err != nil {
		t.Fatal(err)
	}
	pilot, _ := merged.GetPathMap("spec.values.pilot")
	got, err := yaml.Marshal(pilot)
	if err != nil {
		t.Fatal(err)
	}
	const want = `cni:
  enabled: false
enabled: true
env:
  OTHER: "1"
  PILOT_ENABLE_METADATA_EXCHANGE: "true"
replicaCount: 0
resources:
  requests:
    cpu: 100m
    memory: 1Gi
`
	if string(got) != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestIdentityFollowsSettings(t *testing.T) {
	base := settings{images: testImages, profile: "default"}
	id := func(s settings) Identity {
		t.Helper()
		i, err := s.identity()
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	if first, again := id(base), id(base); first != again {
		t.Error("the same settings have two identities")
	}
	domain := base
	domain.clusterDomain = "other.local"
	if id(base).Values == id(domain).Values {
		t.Error("another cluster domain has the same identity")
	}
	if _, err := (settings{images: testImages, profile: "nosuch"}).identity(); err == nil {
		t.Error("an unknown profile has an identity")
	}
}

// What fails is tried again, in the background, and named.
func TestTriesAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kubeconfig")
	s := New(Options{Kubeconfig: file, Profile: "default", Images: testImages, Log: slog.New(slog.DiscardHandler)})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		err := s.Ready(t.Context())
		if err != nil && strings.Contains(err.Error(), "read the kubeconfig") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}
