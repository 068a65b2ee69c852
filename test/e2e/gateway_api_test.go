//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestGatewayAPI(t *testing.T) {
	s := newScenario(t, "gateway-api")
	s.Kubectl(t, "wait", "--for=condition=Accepted", "gatewayclass/istio", "--timeout=60s")
	s.apply("gateway.yaml")
	s.Kubectl(t, "wait", "--for=condition=Programmed", "gateway/outside", "-n", "gateway-api", "--timeout=180s")
	address := s.Kubectl(t, "get", "gateway", "outside", "-n", "gateway-api", "-o", "jsonpath={.status.addresses[*].value}")
	if address != s.Address() {
		t.Errorf("the Gateway has the address %q, want %s", address, s.Address())
	}

	get := func(host, path string) (int, string, error) {
		request, err := http.NewRequest(http.MethodGet, "http://"+address+":8088"+path, nil)
		if err != nil {
			return 0, "", err
		}
		request.Host = host
		response, err := s.HTTP(false).Do(request)
		if err != nil {
			return 0, "", err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		return response.StatusCode, string(text), err
	}
	var r echoReply
	s.Eventually(t, time.Minute, func() (bool, string) {
		status, text, err := get("my-service.example.com", "/shop/cart")
		if err == nil && status == http.StatusOK {
			r, err = parseReply(text)
		}
		return err == nil && status == http.StatusOK, fmt.Sprintf("status %d %s %v", status, text, err)
	})
	if through := strings.Join(r.Headers["X-Through"], ","); r.Path != "/cart" || through != "gateway-api" {
		t.Errorf("the server got the path %s and X-Through %q", r.Path, through)
	}
	wantIdentities(t, r, "spiffe://cluster.local/ns/gateway-api/sa/default", "spiffe://cluster.local/ns/gateway-api/sa/outside-istio")
	for _, other := range [][2]string{{"my-service.example.com", "/other"}, {"other.example.com", "/shop/cart"}} {
		if status, text, err := get(other[0], other[1]); err != nil || status != http.StatusNotFound {
			t.Errorf("http://%s%s has no route, but was answered with status %d %s, %v", other[0], other[1], status, text, err)
		}
	}

	// What istiod has made for the Gateway goes with it.
	s.delete("gateway.yaml")
	s.Eventually(t, time.Minute, func() (bool, string) {
		left := s.Kubectl(t, "get", "deployments,services", "-n", "gateway-api", "-l", "gateway.networking.k8s.io/gateway-name=outside", "-o", "name")
		return left == "", "there is still " + left
	})
}
