package dialect_test

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

var update = flag.Bool("update", false, "write the golden files and, with an Envoy, known_types.txt")

// askEnvoy starts the shipped Envoy and returns the node of its first DiscoveryRequest.
func askEnvoy(t *testing.T) *core.Node {
	t.Helper()
	first := make(chan *core.Node, 1)
	ads := serveADS(t, &adsServer{handle: func(req *discovery.DiscoveryRequest, _ discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
		if req.Node != nil {
			select {
			case first <- req.Node:
			default:
			}
		}
		return nil
	}})
	p := startEnvoy(t, &core.Node{Id: "test", Cluster: "test"}, ads, ads)
	select {
	case node := <-first:
		return node
	case <-p.done:
		t.Fatalf("Envoy exited:\n%s", p.log)
	case <-time.After(30 * time.Second):
		t.Fatalf("Envoy sent no DiscoveryRequest in 30s:\n%s", p.log)
	}
	return nil
}

// TestKnownTypes compares known_types.txt with the types that the shipped Envoy reports.
func TestKnownTypes(t *testing.T) {
	node := askEnvoy(t)
	var reported []string
	for _, ext := range node.Extensions {
		if !ext.Disabled {
			reported = append(reported, ext.TypeUrls...)
		}
	}
	slices.Sort(reported)
	reported = slices.Compact(reported)
	if len(reported) == 0 {
		t.Fatal("Envoy lists no extension types")
	}
	if *update {
		v := node.GetUserAgentBuildVersion().GetVersion()
		header := fmt.Sprintf("# Types that Envoy %d.%d.%d accepts as configuration of an extension, from node.extensions.\n"+
			"# Written by: go test ./pkg/mesh/dialect -run TestKnownTypes -update\n", v.MajorNumber, v.MinorNumber, v.Patch)
		if err := os.WriteFile("known_types.txt", []byte(header+strings.Join(reported, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	var listed []string
	for name := range dialect.ShippedEnvoy() {
		listed = append(listed, name)
	}
	slices.Sort(listed)
	if diff := cmp.Diff(reported, listed); diff != "" {
		t.Errorf("known_types.txt differs from what the shipped Envoy reports (- Envoy, + file); run with -update:\n%s", diff)
	}
}
