package status

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

// piece is a component of a test.
type piece struct {
	name string
	sick error
}

func (p *piece) Name() string                { return p.name }
func (p *piece) Init(context.Context) error  { return nil }
func (p *piece) Start(context.Context) error { return nil }
func (p *piece) Ready(context.Context) error { return p.sick }
func (p *piece) Stop(context.Context) error  { return nil }
func (p *piece) Version() string             { return "v1" }

// program is a component with this process as its own, or with none.
type program struct {
	piece
	pid int
}

func (p *program) PID() int { return p.pid }

func TestServeAndAsk(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "status.sock")
	if _, err := Ask(t.Context(), socket); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a server: %v", err)
	}
	m := component.NewManager(slog.New(slog.DiscardHandler))
	up := []component.Handle{
		m.Add(&piece{name: "datastore"}),
		m.Add(&program{piece{name: "containerd"}, os.Getpid()}),
		m.Add(&program{piece{name: "restarting"}, 0}),
	}
	m.Add(&piece{name: "coredns", sick: errors.New("no room")})
	ctx, cancel := context.WithCancel(t.Context())
	begin := time.Now()
	// The socket of a server that was killed still exists.
	for range 2 {
		if _, err := Serve(ctx, socket, Report{Version: "1", Node: "n", Since: begin}, m); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: %v, %v", info.Mode(), err)
	}
	r, err := Ask(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	// The address of a socket means nothing to a user.
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := Ask(ended, socket); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "://") {
		t.Errorf("without time for an answer: %v", err)
	}
	if r.Ready || r.Components[0].State != component.Waiting {
		t.Errorf("before the start: %+v", r)
	}

	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	for _, c := range up {
		<-c.Ready()
	}
	for r = nil; r == nil || r.Components[3].Message == ""; {
		if r, err = Ask(t.Context(), socket); err != nil {
			t.Fatal(err)
		}
	}
	if r.Ready || r.PID != os.Getpid() || r.Memory == 0 || r.Anonymous == 0 || r.Anonymous > r.Memory || r.Node != "n" || !r.Since.Equal(begin) {
		t.Errorf("got %+v", r)
	}
	for i, want := range []Component{
		{Status: component.Status{Name: "datastore", State: component.Ready}, InServer: true},
		{Status: component.Status{Name: "containerd", State: component.Ready, PID: os.Getpid()}},
		{Status: component.Status{Name: "restarting", State: component.Ready}},
		{Status: component.Status{Name: "coredns", State: component.Starting, Message: "no room"}, InServer: true},
	} {
		got := r.Components[i]
		if (got.Memory > 0) != (want.PID > 0) || got.Version != "v1" || got.Since.Before(begin) {
			t.Errorf("%s: %+v", got.Name, got)
		}
		got.Memory, got.Version, got.Since = 0, "", time.Time{}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}

	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := Ask(t.Context(), socket); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after the server: %v", err)
	}
}

func TestMemory(t *testing.T) {
	if resident, anonymous := Memory(os.Getpid()); resident < 1<<20 || anonymous == 0 {
		t.Errorf("%d, %d", resident, anonymous)
	}
	for _, pid := range []int{0, 1 << 30} {
		if resident, anonymous := Memory(pid); resident != 0 || anonymous != 0 {
			t.Errorf("process %d: %d, %d", pid, resident, anonymous)
		}
	}
}

// The cluster is in a report if there are several nodes, or if it was requested.
func TestScope(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "status.sock")
	s, err := Serve(t.Context(), socket, Report{Role: RoleServer}, component.NewManager(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Ask(t.Context(), socket); err != nil || r.Ready {
		t.Errorf("without components: %+v, %v", r, err)
	}
	if r, err := AskFor(t.Context(), socket, WithCluster); err != nil || r.Cluster != nil || r.Role != RoleServer {
		t.Errorf("before it is known: %+v, %v", r, err)
	}
	for nodes, want := range map[int]map[Scope]bool{
		1: {NodeOnly: false, Automatic: false, WithCluster: true},
		2: {NodeOnly: false, Automatic: true, WithCluster: true},
	} {
		s.DescribeCluster(func(context.Context) *Cluster { return &Cluster{Nodes: make([]Node, nodes)} })
		for scope, want := range want {
			if r, err := AskFor(t.Context(), socket, scope); err != nil || (r.Cluster != nil) != want {
				t.Errorf("%d nodes, scope %q: %+v, %v", nodes, scope, r, err)
			}
		}
	}
	s.DescribeWorkloads(func(ctx context.Context) *Workloads {
		end, ok := ctx.Deadline()
		if !ok || time.Until(end) > workloadsTime {
			t.Error("the workloads may take forever")
		}
		return &Workloads{Troubled: 4, Problems: []Problem{{Name: "api"}}}
	})
	if r, err := Ask(t.Context(), socket); err != nil || r.Workloads != nil {
		t.Errorf("of the node alone: %+v, %v", r, err)
	}
	if r, err := AskFor(t.Context(), socket, Automatic); err != nil || r.Workloads == nil || r.Workloads.Troubled != 4 || r.Workloads.Problems[0].Name != "api" {
		t.Errorf("with workloads: %+v, %v", r, err)
	}
	s.DescribeServers(func() []APIServer { return []APIServer{{Address: "192.0.2.1:6443"}} })
	if r, err := Ask(t.Context(), socket); err != nil || len(r.Servers) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	s.Handle("GET /refused", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { Refuse(w, http.StatusConflict, errors.New("no")) }))
	var refused *RefusedError
	if err := Call(t.Context(), socket, http.MethodGet, "/refused", nil, nil); !errors.As(err, &refused) || refused.Status != http.StatusConflict || refused.Message != "no" {
		t.Errorf("got %v", err)
	}
	if err := Call(t.Context(), socket, http.MethodGet, "/missing", nil, nil); !errors.As(err, &refused) || refused.Status != http.StatusNotFound {
		t.Errorf("got %v", err)
	}
}
