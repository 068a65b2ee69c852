package addon

import (
	"bytes"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
	apiregistration "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/payload"
)

var update = flag.Bool("update", false, "write the golden files again")

func testOptions(name config.Addon) Options {
	return Options{
		Name: name, Log: slog.New(slog.DiscardHandler),
		Image: (&payload.Manifest{Images: []string{
			"registry.polymesh.dev/coredns:1.15.0",
			"registry.polymesh.dev/metrics-server:0.9.0",
			"registry.polymesh.dev/local-path-provisioner:0.0.30",
			"registry.polymesh.dev/busybox:1.35.0",
			"registry.polymesh.dev/forward:0.1.0",
		}}).Image,
		ClusterDNS:    netip.MustParseAddr("10.43.0.10"),
		ClusterDomain: "cluster.local",
		NodeName:      "node-1",
		NodeAddress:   netip.MustParseAddr("192.0.2.10"),
		StorageDir:    `/var/lib/poly "mesh"/storage`,
		Access:        config.ObserveAll,
		Sockets:       "/run/polymesh/observe",
	}
}

func TestRender(t *testing.T) {
	for golden, opts := range map[string]Options{
		"coredns":                 testOptions(config.CoreDNS),
		"coredns-nodes":           testOptions(config.CoreDNS),
		"metrics-server":          testOptions(config.MetricsServer),
		"metrics-server-nodes":    testOptions(config.MetricsServer),
		"metrics-server-external": testOptions(config.MetricsServer),
		"local-storage":           testOptions(config.LocalStorage),
		"observe-access":          testOptions(ObserveAccess),
		"observe-access-rivals":   testOptions(ObserveAccess),
		"observe-access-ingest":   testOptions(ObserveAccess),
	} {
		t.Run(golden, func(t *testing.T) {
			in := inputs{Resolvers: "0123456789abcdef", Hosts: []host{{opts.NodeAddress, opts.NodeName}}}
			opts.External = strings.HasSuffix(golden, "-external")
			if strings.HasSuffix(golden, "-nodes") {
				in.Hosts, in.Spread = append(in.Hosts, host{netip.MustParseAddr("192.0.2.11"), "node-2"}), true
			}
			if strings.HasSuffix(golden, "-rivals") {
				in.Rivals = []string{"jaeger", "prometheus"}
			}
			if strings.HasSuffix(golden, "-ingest") {
				opts.Access = config.ObserveIngest
			}
			objects, err := render(opts, in)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			for _, obj := range objects {
				text, err := yaml.Marshal(obj.Object)
				if err != nil {
					t.Fatal(err)
				}
				got.WriteString("---\n")
				got.Write(text)
			}
			file := filepath.Join("testdata", golden+".yaml")
			if *update {
				if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("rendered manifests differ from %s; run the test with -update and look at the difference", file)
			}
		})
	}
}

// The types of the API server's own packages refuse a field that does not exist or has another type.
func TestRenderedObjectsAreValid(t *testing.T) {
	types := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, apiregistration.AddToScheme} {
		if err := add(types); err != nil {
			t.Fatal(err)
		}
	}
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, types, types, json.SerializerOptions{Strict: true})
	for _, name := range []config.Addon{config.CoreDNS, config.MetricsServer, config.LocalStorage, ObserveAccess} {
		objects, err := render(testOptions(name), inputs{Spread: true})
		if err != nil {
			t.Fatal(err)
		}
		seen := make(map[id]bool)
		for _, obj := range objects {
			text, err := obj.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := strict.Decode(text, nil, nil); err != nil {
				t.Errorf("%s: %s: %v", name, idOf(obj), err)
			}
			if seen[idOf(obj)] {
				t.Errorf("%s: %s is there twice", name, idOf(obj))
			}
			seen[idOf(obj)] = true
			for _, k := range kinds() {
				if k.GroupVersionKind == obj.GroupVersionKind() && k.namespaced != (obj.GetNamespace() != "") {
					t.Errorf("%s: %s: namespaced is %t", name, idOf(obj), k.namespaced)
				}
			}
		}
	}
}

// What the provisioner reads out of its ConfigMap is checked by no one else.
func TestLocalStorageConfig(t *testing.T) {
	objects, err := render(testOptions(config.LocalStorage), inputs{})
	if err != nil {
		t.Fatal(err)
	}
	for _, obj := range objects {
		if obj.GetKind() != "ConfigMap" {
			continue
		}
		data := obj.Object["data"].(map[string]any)
		var settings struct {
			NodePathMap []struct {
				Node  string
				Paths []string
			}
		}
		if err := yaml.Unmarshal([]byte(data["config.json"].(string)), &settings); err != nil {
			t.Fatal(err)
		}
		if got, want := settings.NodePathMap[0].Paths[0], `/var/lib/poly "mesh"/storage`; got != want {
			t.Errorf("path %q, want %q", got, want)
		}
		pod, err := yaml.YAMLToJSONStrict([]byte(data["helperPod.yaml"].(string)))
		if err != nil {
			t.Fatal(err)
		}
		strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Strict: true})
		if _, _, err := strict.Decode(pod, nil, nil); err != nil {
			t.Errorf("helper pod: %v", err)
		}
		return
	}
	t.Fatal("no ConfigMap")
}

func TestRenderRefusesMissingImage(t *testing.T) {
	opts := testOptions(config.LocalStorage)
	opts.Image = (&payload.Manifest{Images: []string{"registry.polymesh.dev/local-path-provisioner:0.0.30"}}).Image
	_, err := render(opts, inputs{})
	if err == nil || !strings.Contains(err.Error(), `no image "busybox"`) {
		t.Errorf("error %v", err)
	}
}

func TestVersion(t *testing.T) {
	if v := New(testOptions(config.LocalStorage)).Version(); v != "0.0.30" {
		t.Errorf("version %q", v)
	}
}
