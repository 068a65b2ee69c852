package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/status"
)

// findingsPath is where the server tells what is wrong in the cluster, on the status socket. The store keeps it (observe/findings).
const findingsPath = "GET /findings"

// findings serves the surveys of the cluster.
type findings struct {
	kubeconfig string

	mu       sync.Mutex
	surveyor *diagnose.Surveyor // nil before the first request with a kubeconfig, which the server's first start writes
}

// ServeHTTP implements http.Handler.
func (f *findings) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	survey, err := f.survey(r.Context())
	if err != nil {
		status.Refuse(w, http.StatusServiceUnavailable, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(survey)
}

func (f *findings) survey(ctx context.Context) (*diagnose.Survey, error) {
	surveyor, err := f.open()
	if err != nil {
		return nil, fmt.Errorf("look for what is wrong in the cluster: %w", err)
	}
	return surveyor.Survey(ctx)
}

func (f *findings) open() (*diagnose.Surveyor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.surveyor == nil {
		client, err := kubeconfig.Client(f.kubeconfig, func(c *rest.Config) {
			c.UserAgent, c.QPS, c.Burst = "polymesh-findings", 50, 100
			// Half as much work as JSON.
			c.ContentType, c.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
		})
		if err != nil {
			return nil, err
		}
		f.surveyor = diagnose.NewSurveyor(client)
	}
	return f.surveyor, nil
}
