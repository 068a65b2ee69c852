//go:build e2e

// Package gatewayapi runs the upstream conformance suite of Gateway API (sigs.k8s.io/gateway-api/conformance) on its own
// node like those of the end-to-end tests, and keeps the suite's report in docs/mesh. It needs root.
//
//	make conformance-gateway                             # all of it, and the report
//	go test … ./test/conformance/gatewayapi -args -only HTTPRouteSimpleSameNamespace   # one test of the suite, no report
//
// It claims what Istio claims: the same profiles and features. None of these tests is left out.
package gatewayapi

import (
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"istio.io/istio/pilot/pkg/config/kube/gateway"
	"istio.io/istio/pkg/kube"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	v1 "sigs.k8s.io/gateway-api/apis/v1"
	upstream "sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/config"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/test/e2e/node"
)

// profiles are those that Istio runs.
var profiles = []suite.ConformanceProfileName{
	suite.GatewayHTTPConformanceProfileName,
	suite.GatewayTLSConformanceProfileName,
	suite.GatewayGRPCConformanceProfileName,
	suite.GatewayTCPConformanceProfileName,
	suite.MeshHTTPConformanceProfileName,
}

var only = flag.String("only", "", "run one test of the suite, by its short name, and write no report")

// versionEnv marks the process inside the node's network namespace, and contains the version under test.
const versionEnv = "POLYMESH_CONFORMANCE_VERSION"

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(versionEnv) == "" {
		if err := node.Guard(); err != nil {
			fmt.Fprintln(os.Stderr, "conformance:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// TestConformance creates the node and runs this program again inside its network namespace: only there are the
// addresses of the Gateways reachable, and the suite connects in many ways.
func TestConformance(t *testing.T) {
	if version := os.Getenv(versionEnv); version != "" {
		runSuite(t, version)
		return
	}
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(filepath.Join(top, "test", "conformance", "gatewayapi", "images.sh")).CombinedOutput(); err != nil {
		t.Fatalf("build the suite's images: %v: %s", err, out)
	}
	archives, err := filepath.Glob(filepath.Join(top, ".build", "conformance", "gatewayapi", "archives", "*.tar"))
	if err != nil {
		t.Fatal(err)
	}
	// Each Gateway gets its own address, as the suite expects. The demo profile requests little CPU per proxy:
	// the suite has thirty of them at a time.
	n := node.ForTest(t, node.Options{Args: []string{"--mesh-profile", "demo", "--loadbalancer-pool", "198.19.0.0/24"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 5*time.Minute)
	for _, archive := range archives {
		n.Import(t, archive)
	}
	// The suite's backend for UDP is CoreDNS, which every node has under another name.
	base, err := upstream.Manifests.ReadFile("base/manifests.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if wanted := regexp.MustCompile(`registry\.k8s\.io/coredns/coredns:\S+`).FindString(string(base)); wanted != "" {
		for image := range strings.FieldsSeq(n.Ctr(t, "images", "ls", "-q")) {
			if strings.HasPrefix(image, "registry.polymesh.dev/coredns:") {
				n.Ctr(t, "images", "tag", image, wanted)
			}
		}
	}
	report, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inside := n.Command(ctx, self, "-test.v", "-test.run=^TestConformance$", "-test.timeout=2h", "-only="+*only)
	inside.Env = append(inside.Env, versionEnv+"="+report.Version)
	inside.Stdout, inside.Stderr = os.Stdout, os.Stderr
	if err := inside.Run(); err != nil {
		t.Errorf("the suite: %v", err)
	}
}

// runSuite runs the suite against the cluster of KUBECONFIG.
func runSuite(t *testing.T, version string) {
	rest, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		t.Fatal(err)
	}
	options := client.Options{Scheme: kube.IstioScheme}
	c, err := client.New(rest, options)
	if err != nil {
		t.Fatal(err)
	}
	clientset, err := kubernetes.NewForConfig(rest)
	if err != nil {
		t.Fatal(err)
	}
	hostname := v1.HostnameAddressType
	s, err := suite.NewConformanceTestSuite(suite.ConformanceOptions{
		ConfigurableOptions: suite.ConfigurableOptions{
			GatewayClassName:     "istio",
			NamespaceLabels:      map[string]string{"istio-injection": "enabled"},
			CleanupTestResources: true,
			SupportedFeatures:    claimed(),
			RunTest:              *only,
			ConformanceProfiles:  profiles,
			TimeoutConfig:        config.DefaultTimeoutConfig(),
			// Required by GatewayStaticAddresses. Istio resolves a name to the address of an existing Service.
			UsableNetworkAddresses:   []v1.GatewaySpecAddress{{Type: &hostname, Value: "infra-backend-v1.gateway-conformance-infra.svc.cluster.local"}},
			UnusableNetworkAddresses: []v1.GatewaySpecAddress{{Type: &hostname, Value: "foo"}},
			Implementation: confv1.Implementation{
				Organization: "polymesh", Project: "polymesh", URL: "https://polymesh.dev", Version: version,
				Contact: []string{"@polymesh/maintainers"},
			},
		},
		Client: c, ClientOptions: options, Clientset: clientset, RestConfig: rest,
		ManifestFS: []fs.FS{&upstream.Manifests},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Setup(t, tests.ConformanceTests)
	if err := s.Run(t, tests.ConformanceTests); err != nil {
		t.Fatal(err)
	}
	if *only != "" {
		return
	}
	report, err := s.Report()
	if err != nil {
		t.Fatal(err)
	}
	text, err := yaml.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(top, "docs", "mesh", "gateway-api-conformance.yaml"), text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// claimed returns the features that Istio claims in its own run of the suite: those published in the GatewayClass, except
// one that it does not have yet (istio/istio#44702).
func claimed() []features.FeatureName {
	return features.SetsToNamesSet(gateway.SupportedFeatures.Clone().Delete(features.MeshClusterIPMatchingFeature)).UnsortedList()
}
