//go:build e2e

package e2e

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// wantCaller waits until a call is answered, and the server knows the caller by this SPIFFE identity, or by none.
func (s *scenario) wantCaller(from, identity string, args ...string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out, err := s.call(from, args...)
		if err != nil {
			return false, fmt.Sprintf("%s, %v: %v", from, args, err)
		}
		r, err := parseReply(out)
		known := identity == "" && r.clientCert() == "" || identity != "" && strings.HasSuffix(r.clientCert(), ";URI="+identity)
		return err == nil && known, fmt.Sprintf("%s, %v: the server has the certificate header %q of the caller, want %q; %v", from, args, r.clientCert(), identity, err)
	})
}

// wantRefused waits until a connection is made and closed without an answer.
func (s *scenario) wantRefused(from string, args ...string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out, err := s.call(from, args...)
		return err != nil && refused.MatchString(err.Error()), fmt.Sprintf("%s, %v: want it refused, got %q %v", from, args, out, err)
	})
}

// wantStatus waits until a call is answered with this status and a text that contains this one.
func (s *scenario) wantStatus(status int, text, from string, args ...string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		got := http.StatusOK
		answer, err := s.call(from, append([]string{"get"}, args...)...)
		if err != nil {
			_, after, _ := strings.Cut(err.Error(), "echo: status ")
			if _, err := fmt.Sscan(after, &got); err != nil {
				got = 0
			}
			answer = err.Error()
		}
		return got == status && strings.Contains(answer, text), fmt.Sprintf("%s, get %v: want status %d with %q, got %d %s", from, args, status, text, got, answer)
	})
}

// What Envoy's RBAC filter responds.
const accessDenied = "RBAC: access denied"

func TestPeerAuthentication(t *testing.T) {
	s := newScenario(t, "peer-authentication")
	const clientID = "spiffe://cluster.local/ns/peer-authentication/sa/client"
	get, grpc := []string{"get", "http://server:8080/"}, []string{"grpc", "server:9090"}

	// The app's manifests make the mesh STRICT.
	s.wantCaller("client", clientID, get...)
	s.wantCaller("client", clientID, grpc...)
	s.wantRefused("plain", get...)
	s.wantRefused("plain", grpc...)

	s.apply("namespace.yaml")
	s.wantCaller("plain", "", get...)
	s.wantCaller("plain", "", grpc...)
	s.wantCaller("client", clientID, get...)
	s.wantCaller("client", clientID, grpc...)

	s.apply("port-disable.yaml")
	s.wantRefused("plain", get...)
	s.wantCaller("plain", "", grpc...)
	s.wantCaller("client", clientID, get...)
	s.wantCaller("client", "", grpc...) // its sidecar knows that the port takes plain text

	s.apply("port-strict.yaml")
	s.wantRefused("plain", grpc...)
	s.wantCaller("plain", "", get...)
	s.wantCaller("client", clientID, grpc...)
	s.wantCaller("client", clientID, get...)
}

func TestAuthorization(t *testing.T) {
	s := newScenario(t, "authorization")
	const server = "http://server:8080"
	t.Run("ALLOW and DENY", func(t *testing.T) {
		s := s.in(t)
		s.wantStatus(http.StatusOK, `"/private"`, "reader", server+"/private")

		s.apply("allow.yaml")
		s.wantStatus(http.StatusForbidden, accessDenied, "reader", server+"/private")
		s.wantStatus(http.StatusForbidden, accessDenied, "reader", "-X", "PUT", server+"/public/a")
		s.wantStatus(http.StatusForbidden, accessDenied, "writer", "-X", "DELETE", server+"/public/a")
		s.wantStatus(http.StatusOK, `"/public/a"`, "reader", server+"/public/a")
		s.wantStatus(http.StatusOK, `"/private"`, "writer", "-X", "PUT", server+"/private")
		s.wantStatus(http.StatusOK, `"/public/drafts/a"`, "reader", server+"/public/drafts/a")

		s.apply("deny.yaml")
		s.wantStatus(http.StatusForbidden, accessDenied, "reader", server+"/public/drafts/a")
		s.wantStatus(http.StatusOK, `"/public/a"`, "reader", server+"/public/a")
		s.wantStatus(http.StatusOK, `"/public/drafts/a"`, "writer", server+"/public/drafts/a")
	})
	t.Run("the guide's policy, corrected", func(t *testing.T) {
		s := s.in(t)
		const inside = "http://fastapi-service." + appNamespace + ":8000"
		s.wantStatus(http.StatusOK, "", "reader", inside+"/api/v1/call-go")
		s.wantStatus(http.StatusOK, "", "reader", inside+"/health")

		s.apply("fastapi-policy.yaml")
		s.wantStatus(http.StatusForbidden, accessDenied, "reader", inside+"/api/v1/call-go")
		s.wantStatus(http.StatusForbidden, accessDenied, "reader", inside+"/health")
		for _, request := range []struct {
			method, path, body string
			status             int
		}{
			{http.MethodGet, "/api/v1/call-go", "", http.StatusOK},
			{http.MethodPost, "/api/v1/predict", `{"data": [1, 2]}`, http.StatusOK},
			{http.MethodDelete, "/api/v1/predict", "", http.StatusForbidden},
		} {
			// The service has two pods.
			s.Eventually(t, time.Minute, func() (bool, string) {
				status, text, err := ask(s.HTTP(false), s.Node, request.method, appHost, request.path, []byte(request.body))
				return err == nil && status == request.status && (status == http.StatusOK) == (text != accessDenied),
					fmt.Sprintf("%s %s through the gateway: status %d %s %v, want %d", request.method, request.path, status, text, err, request.status)
			})
		}
	})
}

// issuer makes tokens: RS256, as RFC 7515 and 7519 have them.
type issuer struct {
	key *rsa.PrivateKey
	id  string
}

func newIssuer(t *testing.T, id string) issuer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return issuer{key: key, id: id}
}

// jwks is the public key as RequestAuthentication takes it.
func (i issuer) jwks() string {
	encode := base64.RawURLEncoding.EncodeToString
	return fmt.Sprintf(`{"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": %q, "n": %q, "e": %q}]}`,
		i.id, encode(i.key.N.Bytes()), encode(big.NewInt(int64(i.key.E)).Bytes()))
}

// token returns a header that carries these claims.
func (i issuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	part := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	text := part(map[string]string{"alg": "RS256", "kid": i.id}) + "." + part(claims)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return "Authorization: Bearer " + text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func TestJWT(t *testing.T) {
	s := newScenario(t, "jwt")
	good, other := newIssuer(t, "key"), newIssuer(t, "key")
	claims := func(more map[string]any) map[string]any {
		c := map[string]any{"iss": "https://issuer.test", "sub": "alice", "exp": time.Now().Add(time.Hour).Unix()}
		for name, value := range more {
			c[name] = value
		}
		return c
	}
	const server, admin = "http://server:8080/", "http://server:8080/admin"
	valid := good.token(t, claims(nil))
	forged := other.token(t, claims(nil))

	manifest, err := os.ReadFile(filepath.Join(s.dir, "request-authentication.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.delete("request-authentication.yaml") })
	s.Apply(t, strings.Replace(string(manifest), "'JWKS'", "'"+good.jwks()+"'", 1))
	s.wantStatus(http.StatusUnauthorized, "Jwt verification fails", "client", "-H", forged, server)
	s.wantStatus(http.StatusOK, "", "client", "-H", valid, server)
	s.wantStatus(http.StatusOK, "", "client", server)

	s.apply("require-principal.yaml")
	s.wantStatus(http.StatusForbidden, accessDenied, "client", server)
	s.wantStatus(http.StatusUnauthorized, "Jwt verification fails", "client", "-H", forged, server)
	s.wantStatus(http.StatusUnauthorized, "Jwt is expired", "client", "-H", good.token(t, claims(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})), server)
	s.wantStatus(http.StatusUnauthorized, "Jwt issuer is not configured", "client", "-H", good.token(t, claims(map[string]any{"iss": "https://other.test"})), server)
	s.wantStatus(http.StatusOK, "", "client", "-H", valid, server)
	s.wantStatus(http.StatusForbidden, accessDenied, "client", "-H", valid, admin)
	s.wantStatus(http.StatusOK, "", "client", "-H", good.token(t, claims(map[string]any{"groups": []string{"users", "admins"}})), admin)
}
