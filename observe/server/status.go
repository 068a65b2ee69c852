package server

import (
	"encoding/json"
	"net/http"
	"os"
	"time"

	"polymesh.dev/polymesh/observe/ingest"
)

// StatusPath is where the status is served, on the socket for root.
const StatusPath = "/api/polymesh/v1/status"

// Status is what the store reports about itself.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Since   time.Time `json:"since"`
	DataDir string    `json:"dataDir"`
	// Disk is how many bytes the store may take, and Retention how many seconds something is kept.
	Disk       int64             `json:"disk"`
	Retention  int64             `json:"retention"`
	Components []ComponentStatus `json:"components"`
	// Nodes are the other machines that send their logs and numbers.
	Nodes []ingest.NodeStatus `json:"nodes,omitempty"`
}

// statusHandler serves the status: fixed values with the current state.
func statusHandler(known Status, life *lifecycle, nodes func() []ingest.NodeStatus) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, "only GET", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		now := known
		now.PID, now.Components, now.Nodes = os.Getpid(), life.status(), nodes()
		_ = json.NewEncoder(w).Encode(now)
	})
}
