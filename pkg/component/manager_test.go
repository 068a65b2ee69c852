package component

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// journal records the events of a test's components, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) index(t *testing.T, line string) int {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	i := slices.Index(j.lines, line)
	if i < 0 {
		t.Fatalf("%q did not happen: %q", line, j.lines)
	}
	return i
}

func (j *journal) has(line string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Contains(j.lines, line)
}

// piece is a component of a test.
type piece struct {
	*journal
	name      string
	startTime time.Duration // duration of Start
	readyTime time.Duration // time from Start until it is ready
	initErr   error
	startErr  error
	failure   chan error
	stopWaits bool // Stop only returns when its context ends
	hangs     bool // Start only returns when its context ends
	deaf      bool // Start only returns when end is closed
	end       chan struct{}
	warns     []string
	outlived  time.Duration

	mu      sync.Mutex
	begin   time.Time
	sick    error
	asked   int
	slow    time.Duration // duration of Ready, unless its context ends first
	running context.Context
}

func (p *piece) Name() string { return p.name }

func (p *piece) Init(context.Context) error {
	p.add("init %s", p.name)
	return p.initErr
}

func (p *piece) Start(ctx context.Context) error {
	p.add("start %s", p.name)
	switch {
	case p.hangs:
		<-ctx.Done()
		return fmt.Errorf("dial: %w", ctx.Err())
	case p.deaf:
		<-p.end
		return nil
	}
	time.Sleep(p.startTime)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begin = time.Now()
	p.running, _ = Running(ctx)
	return p.startErr
}

func (p *piece) Notes(context.Context) []string { return p.warns }

func (p *piece) OutlivedFor() time.Duration { return p.outlived }

func (p *piece) Ready(ctx context.Context) error {
	p.mu.Lock()
	slow := p.slow
	p.mu.Unlock()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	if p.readyTime < 0 || time.Since(p.begin) < p.readyTime {
		return errors.New("not yet")
	}
	if p.sick == nil && !p.has("ready "+p.name) {
		p.add("ready %s", p.name)
	}
	return p.sick
}

func (p *piece) Stop(ctx context.Context) error {
	p.add("stop %s", p.name)
	if p.stopWaits {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (p *piece) Failed() <-chan error { return p.failure }

func (p *piece) setSick(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sick = err
}

func (p *piece) setSlow(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow = d
}

// run starts the manager in the background; the result arrives in the channel.
func run(ctx context.Context, m *Manager) <-chan error {
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return done
}

func manager() *Manager { return NewManager(slog.New(slog.DiscardHandler)) }

func states(m *Manager) string {
	var s []string
	for _, c := range m.Status(context.Background()) {
		s = append(s, c.Name+"="+string(c.State))
	}
	return strings.Join(s, " ")
}

func TestStartsInOrderAndStopsInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		m := manager()
		db := m.Add(&piece{journal: j, name: "db", readyTime: time.Second})
		node := m.Add(&piece{journal: j, name: "node", startTime: 3 * time.Second})
		api := m.Add(&piece{journal: j, name: "api", readyTime: 2 * time.Second}, db)
		pods := m.Add(&piece{journal: j, name: "pods", readyTime: time.Second}, api, node)
		ctx, cancel := context.WithCancel(context.Background())
		begin := time.Now()
		go func() {
			<-pods.Ready()
			j.add("up after %s", time.Since(begin).Round(time.Second))
		}()
		done := run(ctx, m)

		time.Sleep(500 * time.Millisecond)
		if got, want := states(m), "db=Starting node=Starting api=Waiting pods=Waiting"; got != want {
			t.Errorf("at first: %s, want %s", got, want)
		}
		time.Sleep(10 * time.Second)
		if got, want := states(m), "db=Ready node=Ready api=Ready pods=Ready"; got != want {
			t.Errorf("later: %s, want %s", got, want)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the end that was asked for is an error: %v", err)
		}
		if got, want := states(m), "db=Stopped node=Stopped api=Stopped pods=Stopped"; got != want {
			t.Errorf("at the end: %s, want %s", got, want)
		}
		// All are initialized before the first starts; independent components start at the same time.
		for _, pair := range [][2]string{
			{"init pods", "start db"}, {"ready db", "start api"}, {"ready api", "start pods"}, {"ready node", "start pods"},
			{"start node", "ready db"}, {"ready pods", "up after 4s"},
			{"stop pods", "stop api"}, {"stop api", "stop node"}, {"stop node", "stop db"},
		} {
			if j.index(t, pair[0]) > j.index(t, pair[1]) {
				t.Errorf("%q came after %q: %q", pair[0], pair[1], j.lines)
			}
		}
	})
}

func TestFailureStopsTheNodeAndNamesTheComponent(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*piece)
		fail   error
		want   string
	}{
		"start":                      {func(p *piece) { p.startErr = errors.New("no room") }, nil, "api: no room"},
		"start, by a timeout of its": {func(p *piece) { p.startErr = fmt.Errorf("dial: %w", context.Canceled) }, nil, "api: dial: context canceled"},
		"while it runs":              {func(*piece) {}, errors.New("lost the datastore"), "api: lost the datastore"},
		"while it runs, cancelled":   {func(*piece) {}, context.Canceled, "api: context canceled"},
		"before it was ready":        {func(p *piece) { p.readyTime = -1 }, errors.New("bad flag"), "api: bad flag"},
		"without a reason":           {func(p *piece) { close(p.failure) }, nil, "api: ended by itself"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := &journal{}
				api := &piece{journal: j, name: "api", startTime: time.Second / 2, failure: make(chan error, 1)}
				c.change(api)
				m := manager()
				db := m.Add(&piece{journal: j, name: "db"})
				m.Add(api, db)
				pods := m.Add(&piece{journal: j, name: "pods", readyTime: -1}, db)
				m.Add(&piece{journal: j, name: "late"}, pods)
				done := run(context.Background(), m)
				time.Sleep(2 * time.Second)
				if c.fail != nil {
					api.failure <- c.fail
				}
				err := <-done
				if err == nil || err.Error() != c.want {
					t.Fatalf("error is %v, want %s", err, c.want)
				}
				if j.index(t, "stop pods") > j.index(t, "stop api") || j.index(t, "stop api") > j.index(t, "stop db") {
					t.Errorf("stopped in another order: %q", j.lines)
				}
				if j.has("start late") || j.has("stop late") {
					t.Errorf("what had not started was touched: %q", j.lines)
				}
				if got, want := states(m), "db=Stopped api=Failed pods=Stopped late=Waiting"; got != want {
					t.Errorf("states are %s, want %s", got, want)
				}
			})
		})
	}
}

// Changes to the machine happen after every component has accepted its configuration, and before any starts.
func TestOnceChecked(t *testing.T) {
	j := &journal{}
	m := manager()
	m.OnceChecked(func(context.Context) error { j.add("changed"); return nil })
	m.Add(&piece{journal: j, name: "db"})
	m.Add(&piece{journal: j, name: "api"})
	ctx, cancel := context.WithCancel(t.Context())
	done := run(ctx, m)
	<-m.Settled()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, pair := range [][2]string{{"init db", "changed"}, {"init api", "changed"}, {"changed", "start db"}, {"changed", "start api"}} {
		if j.index(t, pair[0]) > j.index(t, pair[1]) {
			t.Errorf("%q came after %q: %q", pair[0], pair[1], j.lines)
		}
	}

	m = manager()
	m.OnceChecked(func(context.Context) error { return errors.New("no room") })
	m.Add(&piece{journal: &journal{}, name: "db"})
	if err := m.Run(t.Context()); err == nil || err.Error() != "no room" || states(m) != "db=Waiting" {
		t.Errorf("error %v, %s", err, states(m))
	}
}

func TestInitErrorStartsNothing(t *testing.T) {
	j := &journal{}
	m := manager()
	m.OnceChecked(func(context.Context) error { j.add("changed"); return nil })
	m.Add(&piece{journal: j, name: "db"})
	m.Add(&piece{journal: j, name: "api", initErr: errors.New("bad flag")})
	if err := m.Run(t.Context()); err == nil || err.Error() != "api: bad flag" {
		t.Errorf("error is %v", err)
	}
	if j.has("start db") || j.has("changed") {
		t.Errorf("db was started, or the machine changed: %q", j.lines)
	}
}

func TestCancelledWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		m := manager()
		slow := &piece{journal: j, name: "slow", startTime: 10 * time.Second}
		m.Add(&piece{journal: j, name: "after"}, m.Add(slow))
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		j.index(t, "stop slow")
		if j.has("start after") {
			t.Error("after was started")
		}
		if slow.running.Err() != nil {
			t.Error("a component's context ended before its Stop")
		}

		// Canceled before the start: nothing starts.
		j = &journal{}
		m = manager()
		m.Add(&piece{journal: j, name: "db"})
		if err := m.Run(ctx); err != nil || j.has("start db") {
			t.Errorf("error %v, %q", err, j.lines)
		}
	})
}

// A Start that waits (for a database, say) ends with the node, and does not count as failed.
func TestStartIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		m := manager()
		db := m.Add(&piece{journal: j, name: "db"})
		m.Add(&piece{journal: j, name: "api", hangs: true}, db)
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(time.Second)
		begin := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("error is %v", err)
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("the node waited %s for the start", took)
		}
		if j.index(t, "stop api") > j.index(t, "stop db") {
			t.Errorf("stopped in another order: %q", j.lines)
		}
	})
}

// One that ignores its context delays the end, but the others are stopped anyway.
func TestStartThatCannotBeCancelled(t *testing.T) {
	j := &journal{}
	synctest.Test(t, func(t *testing.T) {
		m := manager()
		db := m.Add(&piece{journal: j, name: "db"})
		deaf := &piece{journal: j, name: "api", deaf: true, end: make(chan struct{})}
		m.Add(deaf, db)
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(time.Second)
		begin := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("error is %v", err)
		}
		if took := time.Since(begin); took != stopGrace {
			t.Errorf("the node ended after %s, want %s", took, stopGrace)
		}
		j.index(t, "stop db")
		if j.has("stop api") {
			t.Error("Stop was called beside Start")
		}
		close(deaf.end)
	})
}

// Without a kubelet the API server is still useful: the node fails, but later.
func TestFailureIsOutlived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		m := manager()
		api := m.Add(&piece{journal: j, name: "api"})
		kubelet := &piece{journal: j, name: "kubelet", failure: make(chan error, 1), outlived: time.Minute}
		m.Add(kubelet, api)
		done := run(context.Background(), m)
		time.Sleep(time.Second)
		begin := time.Now()
		kubelet.failure <- errors.New("bad checkpoint")
		time.Sleep(59 * time.Second)
		if got, want := states(m), "api=Ready kubelet=Failed"; got != want {
			t.Errorf("after 59 s: %s, want %s", got, want)
		}
		if err := <-done; err == nil || err.Error() != "kubelet: bad checkpoint" || time.Since(begin) != time.Minute {
			t.Errorf("ended after %s with %v", time.Since(begin), err)
		}

		// When the node is stopped, the delay is skipped.
		m = manager()
		kubelet = &piece{journal: j, name: "kubelet", failure: make(chan error, 1), outlived: time.Minute}
		m.Add(kubelet)
		ctx, cancel := context.WithCancel(context.Background())
		done = run(ctx, m)
		kubelet.failure <- errors.New("bad checkpoint")
		time.Sleep(time.Second)
		begin = time.Now()
		cancel()
		<-done
		if took := time.Since(begin); took != 0 {
			t.Errorf("stopped after %s", took)
		}
	})
}

// A status request that is abandoned, or that hits a slow component, does not change the state.
func TestStatusIsNotMadeWorseByAsking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := manager()
		p := &piece{journal: &journal{}, name: "api"}
		m.Add(p)
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(time.Second)
		since := m.Status(ctx)[0].Since
		p.setSlow(5 * time.Second)
		gone, leave := context.WithTimeout(context.Background(), time.Second)
		defer leave()
		if s := m.Status(gone)[0]; s.State != Ready || gone.Err() == nil {
			t.Errorf("to who does not wait the state is %+v", s)
		}
		time.Sleep(2 * watchPoll)
		if s := m.Status(context.Background())[0]; s.State != Ready || s.Since != since {
			t.Errorf("after that the state is %+v, want Ready since %s", s, since)
		}
		// A check that never returns counts as not ready, within the time limit.
		p.setSlow(time.Hour)
		begin := time.Now()
		if s := m.Status(context.Background())[0]; s.State != NotReady || time.Since(begin) > checkTime {
			t.Errorf("after %s a hung component is %+v", time.Since(begin), s)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestWarningShowsAndIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		m := NewManager(slog.New(slog.NewTextHandler(&log, nil)))
		p := &piece{journal: &journal{}, name: "db", warns: []string{"the disk is 91 % full", "a; b"}}
		m.Add(p)
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(5 * watchPoll)
		if s := m.Status(ctx)[0]; s.State != Ready || s.Message != "" || !slices.Equal(s.Notes, p.warns) {
			t.Errorf("status is %+v", s)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := strings.Count(log.String(), "91 %"); n != 1 {
			t.Errorf("the warning was logged %d times: %s", n, log.String())
		}
	})
}

// counting is a component with numbers for the status.
type counting struct{ *piece }

func (c counting) Summary() string { return "3 of 3" }

// A summary shows in the status, also with a warning, and is not logged as one.
func TestSummaryShows(t *testing.T) {
	for _, warns := range [][]string{nil, {"the disk is 91 % full"}} {
		synctest.Test(t, func(t *testing.T) {
			var log strings.Builder
			m := NewManager(slog.New(slog.NewTextHandler(&log, nil)))
			m.Add(counting{&piece{journal: &journal{}, name: "db", warns: warns}})
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- m.Run(ctx) }()
			time.Sleep(time.Minute)
			if s := m.Status(ctx)[0]; s.Message != "3 of 3" || !slices.Equal(s.Notes, warns) {
				t.Errorf("with the warnings %q the status is %+v", warns, s)
			}
			if strings.Contains(log.String(), "level=WARN") != (len(warns) > 0) {
				t.Errorf("with the warnings %q the log is %s", warns, log.String())
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

// Since Go 1.26 a signal's context has its own cause; it still is a normal end.
func TestSignalIsNoError(t *testing.T) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGUSR1)
	defer stop()
	m := manager()
	db := m.Add(&piece{journal: &journal{}, name: "db"})
	done := run(ctx, m)
	<-db.Ready()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("error is %v", err)
	}
}

func TestReadinessIsWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		m := NewManager(slog.New(slog.NewTextHandler(&log, nil)))
		p := &piece{journal: &journal{}, name: "dns"}
		m.Add(p)
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		time.Sleep(time.Second)
		p.setSick(errors.New("no pod"))
		time.Sleep(5 * watchPoll)
		s := m.Status(ctx)[0]
		if s.State != NotReady || s.Message != "no pod" || time.Since(s.Since) < 3*watchPoll {
			t.Errorf("status is %+v", s)
		}
		p.setSick(nil)
		// A status request returns the current state, not that of the last check.
		if s := m.Status(ctx)[0]; s.State != Ready || s.Message != "" {
			t.Errorf("status is %+v", s)
		}
		time.Sleep(2 * watchPoll)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := strings.Count(log.String(), "not ready"); n != 1 || strings.Count(log.String(), "ready again") != 1 {
			t.Errorf("logged %d times: %s", n, log.String())
		}
	})
}

func TestStopGivesUpAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		m := manager()
		db := m.Add(&piece{journal: j, name: "db"})
		api := m.Add(&piece{journal: j, name: "api", stopWaits: true}, db)
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			<-api.Ready()
			cancel()
		}()
		begin := time.Now()
		done := run(ctx, m)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if took := time.Since(begin); took < stopGrace || took > stopGrace+time.Second {
			t.Errorf("stopped after %s", took)
		}
		j.index(t, "stop db")
	})
}

func TestTask(t *testing.T) {
	for name, c := range map[string]struct {
		run  func(context.Context) error
		want string
	}{
		"error":      {func(context.Context) error { return errors.New("broken") }, "broken"},
		"return":     {func(context.Context) error { return nil }, "ended by itself"},
		"panic":      {func(context.Context) error { panic("oops") }, "panicked: oops: start the server again; if that ends the same way, the log has the stack for a bug report"},
		"until Stop": {func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				task := NewTask()
				if err := task.Stop(t.Context()); err != nil {
					t.Errorf("stop before the start: %v", err)
				}
				task.Go(t.Context(), c.run)
				synctest.Wait()
				select {
				case err := <-task.Failed():
					if err.Error() != c.want {
						t.Errorf("failed with %q, want %q", err, c.want)
					}
					if p := (*Panic)(nil); name == "panic" && (!errors.As(err, &p) || !strings.Contains(string(p.Stack), "TestTask")) {
						t.Errorf("the stack of %#v does not say where it panicked", err)
					}
				default:
					if c.want != "" {
						t.Error("did not fail")
					}
				}
				for range 2 {
					if err := task.Stop(t.Context()); err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

func TestTaskThatDoesNotStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		task := NewTask()
		end := make(chan struct{})
		task.Go(t.Context(), func(context.Context) error { <-end; return nil })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := task.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
		close(end)
	})
}
