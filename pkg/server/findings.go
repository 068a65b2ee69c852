package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/status"
)

// findingsPath is where the server tells what is wrong in the cluster, on the status socket. The store keeps it (observe/findings).
const findingsPath = "GET /findings"

// overviewAge is how old what `polymesh status` says about the cluster may be. It changes slowly, and asks every member of etcd.
const overviewAge = time.Minute

// overviewTime is how long it may take to learn it. It is not the request's: what was learned while one went away is the answer to those after it.
const overviewTime = 10 * time.Second

// lastAge is how old a survey may be that `polymesh status` shows when there is no time for another one.
const lastAge = 2 * time.Minute

// ofCluster is the kind and the reason of what is wrong with no object in the cluster, but with its servers: members of etcd, certificates,
// snapshots.
const ofCluster = "Cluster"

// findings serves the surveys of the cluster, with what `polymesh status` warns of.
type findings struct {
	kubeconfig string
	overview   func(context.Context) *status.Cluster

	mu       sync.Mutex
	surveyor *diagnose.Surveyor // nil before the first request with a kubeconfig, which the server's first start writes
	at       time.Time
	cluster  []diagnose.Found
}

// ServeHTTP implements http.Handler.
func (f *findings) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// First: it is known without the API server, too.
	cluster := f.ofCluster(r.Context())
	survey, err := f.survey(r.Context())
	if err != nil && len(cluster) == 0 {
		status.Refuse(w, http.StatusServiceUnavailable, err)
		return
	}
	answer := diagnose.Survey{At: time.Now(), Findings: cluster}
	if err == nil {
		answer = *survey
		answer.Findings = slices.Concat(cluster, survey.Findings)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

// ofCluster returns what is wrong with the servers.
func (f *findings) ofCluster(ctx context.Context) []diagnose.Found {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.at.IsZero() && time.Since(f.at) < overviewAge {
		return f.cluster
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), overviewTime)
	defer cancel()
	c := f.overview(ctx)
	f.at, f.cluster = time.Now(), []diagnose.Found{}
	add := func(text string, bad bool) {
		f.cluster = append(f.cluster, diagnose.Found{Reason: ofCluster, Kind: ofCluster, Message: diagnose.Line(text), Bad: bad})
	}
	if c.Problem != "" {
		add("the cluster does not work: "+c.Problem, true)
	}
	for _, text := range c.Warnings {
		add(text, false)
	}
	if c.Snapshot != nil && c.Snapshot.Failure != "" {
		add("the last scheduled snapshot failed: "+c.Snapshot.Failure, false)
	}
	return f.cluster
}

func (f *findings) survey(ctx context.Context) (*diagnose.Survey, error) {
	surveyor, err := f.open()
	if err != nil {
		return nil, fmt.Errorf("look for what is wrong in the cluster: %w", err)
	}
	return surveyor.Survey(ctx)
}

// workloads returns what is wrong with the workloads, and which namespaces do not end, for `polymesh status`. If a survey takes longer than ctx, the last one is what is known.
func (f *findings) workloads(ctx context.Context) *status.Workloads {
	survey, err := f.survey(ctx)
	if err != nil {
		f.mu.Lock()
		surveyor := f.surveyor
		f.mu.Unlock()
		if surveyor != nil && ctx.Err() != nil {
			survey = surveyor.Last()
		}
		if survey == nil || time.Since(survey.At) > lastAge {
			return &status.Workloads{Unknown: diagnose.Line(err.Error())}
		}
	}
	return troubled(survey)
}

// troubled returns the workloads of a survey, and its namespaces. Nodes have a part of their own in the status.
func troubled(survey *diagnose.Survey) *status.Workloads {
	type object struct{ kind, namespace, name string }
	seen := map[object]bool{}
	w := &status.Workloads{Troubled: survey.More}
	for _, x := range survey.Findings {
		of := object{x.Kind, x.Namespace, x.Name}
		if x.Namespace == "" && x.Kind != diagnose.NamespaceKind || seen[of] {
			continue
		}
		seen[of] = true
		w.Troubled++
		if len(w.Problems) < status.MaxProblems {
			w.Problems = append(w.Problems, status.Problem{
				Kind: x.Kind, Namespace: x.Namespace, Name: x.Name, Pod: x.Pod, Container: x.Container, Reason: string(x.Reason), Message: x.Message, Advice: x.Advice,
				Since: x.Since, Checked: x.Checked, Ready: x.Ready, Replicas: x.Replicas,
			})
		}
	}
	return w
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
