//go:build integration

package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/status"
)

// A process can have only one control plane.
func TestCluster(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.DiscardHandler))
	t.Run("Findings", func(t *testing.T) { findingsOfTheCluster(t, kubeconfig) })
	t.Run("Admissible", func(t *testing.T) { admissibleServers(t, kubeconfig) })
}

// What the store asks for, of a real API server. Before there is one, the answer is an error.
func findingsOfTheCluster(t *testing.T, kubeconfig string) {
	get := func(f *findings) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		f.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/findings", nil))
		return w
	}
	seen := &status.Cluster{Snapshot: &status.Snapshot{}}
	early := &findings{kubeconfig: filepath.Join(t.TempDir(), "none"), overview: func(context.Context) *status.Cluster { return seen }}
	if w := get(early); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), `{"message":"look for what is wrong in the cluster: read kubeconfig`) {
		t.Errorf("without a kubeconfig: %d %s", w.Code, w.Body)
	}
	// Without the API server, it is still known what is wrong with the servers.
	early.at = time.Time{}
	seen = &status.Cluster{Problem: "2 of 3 servers are away", Warnings: []string{"the certificate\nx expires"}, Snapshot: &status.Snapshot{Failure: "disk full"}}
	var survey diagnose.Survey
	if err := json.Unmarshal(get(early).Body.Bytes(), &survey); err != nil || len(survey.Findings) != 3 || !survey.Findings[0].Bad || survey.Findings[1].Bad ||
		survey.Findings[0].Message != "the cluster does not work: 2 of 3 servers are away" || survey.Findings[1].Message != "the certificate x expires" {
		t.Errorf("without the API server: %+v, %v", survey, err)
	}
	early.kubeconfig = kubeconfig
	client := controlplanetest.Client(t, early.kubeconfig)
	node, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.ResourceVersion = "" // whatever the controllers write meanwhile
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionFalse, Message: "container runtime is down", LastTransitionTime: metav1.Now()}}
	if _, err := client.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	w := get(early)
	survey = diagnose.Survey{}
	if err := json.Unmarshal(w.Body.Bytes(), &survey); err != nil || w.Code != http.StatusOK {
		t.Fatalf("%d %s: %v", w.Code, w.Body, err)
	}
	// A node is no workload. What is wrong with one is known to `polymesh status`, also if there is no time to look.
	if got := early.workloads(t.Context()); got.Troubled != 0 || got.Unknown != "" {
		t.Errorf("of the workloads it is known: %+v", got)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if got := early.workloads(gone); got.Unknown != "" {
		t.Errorf("without time: %+v", got)
	}
	never := &findings{kubeconfig: early.kubeconfig}
	if got := never.workloads(gone); !strings.Contains(got.Unknown, "context canceled") {
		t.Errorf("without time, and before the first survey: %+v", got)
	}
	if len(survey.Findings) != 4 || survey.Findings[3].Name != "n1" || survey.Findings[3].Message != "container runtime is down" || time.Since(survey.At) > time.Minute {
		t.Errorf("it finds %+v", survey)
	}
}

func TestTroubled(t *testing.T) {
	got := troubled(&diagnose.Survey{More: 1, Findings: []diagnose.Found{
		{Kind: "Node", Name: "n1", Reason: diagnose.NodeNotReady},
		{Kind: diagnose.NamespaceKind, Name: "shop", Reason: diagnose.Deleting, Message: "it was deleted and still exists"},
		{Kind: "Deployment", Namespace: "shop", Name: "api", Pod: "api-1", Reason: "Crash"},
		{Kind: "Deployment", Namespace: "shop", Name: "api", Pod: "api-2", Reason: "Crash"},
	}})
	if got.Troubled != 3 || len(got.Problems) != 2 || got.Problems[0].Name != "shop" || got.Problems[0].Message == "" || got.Problems[1].Pod != "api-1" {
		t.Errorf("got %+v", got)
	}
}
