package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	appNamespace = "polyglot-services"
	appHost      = "api.example.com"
	echoImage    = "registry.polymesh.dev/test/echo:1"
)

// importArchives imports images into the node's containerd.
func (b *bench) importArchives(ctx context.Context, n *node.Node, pattern string) error {
	archives, err := filepath.Glob(filepath.Join(b.top, ".build", pattern))
	if err != nil {
		return err
	}
	if len(archives) == 0 {
		return fmt.Errorf("there is no image archive .build/%s", pattern)
	}
	for _, archive := range archives {
		if err := polymesh(ctx, n, "ctr", "images", "import", archive); err != nil {
			return err
		}
	}
	return nil
}

// deployApp does what the guide's deploy.sh does, and waits until the app responds through the gateway.
func (b *bench) deployApp(ctx context.Context, n *node.Node) error {
	if err := b.importArchives(ctx, n, "polyglot/*-1.0.0.tar"); err != nil {
		return err
	}
	app := filepath.Join(b.top, "examples", "polyglot")
	for _, args := range [][]string{
		{"apply", "-f", filepath.Join(app, "k8s", "namespace.yaml")},
		{"create", "secret", "generic", "db-credentials", "-n", appNamespace, "--from-literal=url=postgresql://user:pass@postgres.external.example.com:5432/mydb"},
		{"apply", "-n", appNamespace, "-f", filepath.Join(app, "k8s", "fastapi"), "-f", filepath.Join(app, "k8s", "go")},
		{"apply", "-f", filepath.Join(app, "istio")},
		{"rollout", "status", "-n", appNamespace, "deployment/fastapi-service", "--timeout=300s"},
		{"rollout", "status", "-n", appNamespace, "deployment/go-service", "--timeout=300s"},
	} {
		if err := polymesh(ctx, n, append([]string{"kubectl"}, args...)...); err != nil {
			return err
		}
	}
	return eventually(ctx, n, 2*time.Minute, func() error { return predict(ctx, n) })
}

func predict(ctx context.Context, n *node.Node) error {
	text, err := ask(ctx, n, http.MethodPost, appHost, "/api/v1/predict", `{"data": [1.0, 2.0, 3.0]}`)
	if err == nil && !strings.Contains(text, `"prediction":2`) {
		err = errors.New("predict returned " + text)
	}
	return err
}

// ask sends a request to the gateway, from outside. A status other than 200 is an error.
func ask(ctx context.Context, n *node.Node, method, host, path, body string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+n.Address()+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	request.Host = host
	request.Header.Set("Content-Type", "application/json")
	response, err := n.HTTP(false).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s%s: %s %s", host, path, response.Status, text)
	}
	return string(text), err
}
