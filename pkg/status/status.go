// Package status implements `polymesh status`: a running server reports the state of its components on a socket in its
// run directory; nothing is written to disk.
package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

// Report is a server's status.
type Report struct {
	Version    string    `json:"version"`
	PID        int       `json:"pid"`
	Since      time.Time `json:"since"`
	DataDir    string    `json:"dataDir"`
	Node       string    `json:"node"`
	NodeIP     string    `json:"nodeIP"`
	Kubeconfig string    `json:"kubeconfig"`
	// Memory is the resident memory of the server process in bytes, Anonymous the part that is not file-backed.
	Memory     uint64      `json:"memoryBytes"`
	Anonymous  uint64      `json:"anonymousBytes"`
	Ready      bool        `json:"ready"`
	Components []Component `json:"components"`
}

// Component is one row of the report.
type Component struct {
	component.Status
	// Memory is the resident memory of the component's own process in bytes; 0 if it runs in the server process.
	Memory uint64 `json:"memoryBytes,omitempty"`
	// InServer is set if the component runs inside the server process.
	InServer bool `json:"inServer"`
}

// Source is where the states come from: a component.Manager.
type Source interface {
	Status(ctx context.Context) []component.Status
}

// Serve serves the status on the socket until ctx ends.
func Serve(ctx context.Context, socket string, base Report, source Source) error {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the socket of a previous run: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen for status requests: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(report(r.Context(), base, source))
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { server.Close() })
	go func() { _ = server.Serve(listener) }()
	return nil
}

func report(ctx context.Context, base Report, source Source) Report {
	base.PID = os.Getpid()
	base.Memory, base.Anonymous = Memory(base.PID)
	base.Ready = true
	for _, s := range source.Status(ctx) {
		row := Component{Status: s, InServer: !s.Separate}
		row.Memory, _ = Memory(s.PID)
		base.Ready = base.Ready && (s.State == component.Ready || s.State == component.Standby)
		base.Components = append(base.Components, row)
	}
	return base
}

// ErrNotRunning means that no server is running for the data dir.
var ErrNotRunning = errors.New("no server is running")

// Ask requests the report of the server that listens on the socket.
func Ask(ctx context.Context, socket string) (*Report, error) {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://polymesh/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNotRunning
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("only root can read %s: run it with sudo", socket)
	}
	if err != nil {
		return nil, fmt.Errorf("request the server's status: %w", err)
	}
	defer resp.Body.Close()
	r := &Report{}
	if err := json.NewDecoder(resp.Body).Decode(r); err != nil {
		return nil, fmt.Errorf("read the server's response: %w", err)
	}
	return r, nil
}

// Memory returns the resident and the anonymous memory of a process, in bytes; both are 0 if the process does not exist.
func Memory(pid int) (resident, anonymous uint64) {
	if pid == 0 {
		return 0, 0
	}
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			resident = kib << 10
		case "RssAnon:":
			anonymous = kib << 10
		}
	}
	return resident, anonymous
}
