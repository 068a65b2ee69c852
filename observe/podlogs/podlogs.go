// Package podlogs reads the logs of all containers of this machine, as the kubelet and containerd write them below /var/log/pods, into a Store.
//
// It owns how far it has read and saves it on disk. A line is stored exactly once, whatever is killed, if its file still exists
// when the program runs again. The places in the files are only saved when the lines before them are on disk (package checkpoint), and
// lines that were stored after the saved place are recognised at the start. The kubelet keeps five files of 10 MiB for each container.
//
// Others may write into the folder through a hostPath: links out of it are not followed, only regular files are
// read, and everything is counted and bounded.
//
// It checks the sizes of the open files four times a second instead of using inotify. For a hundred files that costs less
// than a thousandth of a core, a noisy pod does not add to it, and there is no limit on watches.
package podlogs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/checkpoint"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
)

// Job is the value of the label job on all these lines.
const Job = "pods"

// Names of metadata on the lines.
const (
	// MetaUID is the uid of the pod, which distinguishes it from earlier pods with the same name.
	MetaUID = "uid"
	// MetaRestart is how often the container had been restarted.
	MetaRestart = "restart"
	// MetaDropped is on a line about dropped lines, and holds their number.
	MetaDropped = "dropped"
)

// StreamPolymesh is the value of the label stream on lines that this package wrote itself, beside stdout and stderr.
const StreamPolymesh = "polymesh"

// Store keeps lines: a logstore.Store, or the buffer for one on another machine (push.Buffer).
type Store interface {
	Append([]logstore.Entry) error
	Each(context.Context, logstore.Selector, func(logstore.Entry) bool) error
	checkpoint.Store
}

// Options say what is read.
type Options struct {
	// Root is the folder of the pods' logs, /var/log/pods when empty. It need not exist yet.
	Root string
	// Node is the name of this machine, for the label.
	Node string
	// Store gets the lines.
	Store Store
	// State is the file that stores how far each log was read.
	State string
	// Workload returns the name of the Deployment (StatefulSet, DaemonSet, Job …) of a pod, and whether that is known. It must not block. A pod that
	// is not known after some seconds gets a name guessed from its own. Workload may be nil.
	Workload func(namespace, pod, uid string) (name string, known bool)
	// LinesPerSecond is how many lines of one pod are kept, 2,000 when zero, if they have at most 512 bytes on average. More are counted
	// and dropped.
	LinesPerSecond int
	// History is how many bytes of a container's older logs are read at the very first start, 16 MiB when zero.
	History int64
	Log     *slog.Logger
}

// numbers counts what a Tailer has done since New.
type numbers struct {
	pods, files int64 // now
	lines       int64 // stored
	dropped     int64 // above LinesPerSecond, or too long for it
	refused     int64 // by the store: too old, or too many streams
	malformed   int64 // not in containerd's format
	ignored     int64 // names in the folder that do not belong to a pod, now
}

// Tailer reads the logs. It cannot run again after Run has ended.
type Tailer struct {
	opts  Options
	state *state // as it was saved by an earlier run
	root  int    // file descriptor, -1 until the folder exists
	pods  map[string]*pod
	// started is the time until which an earlier run may have stored lines.
	started time.Time
	first   bool // there was no state, and this is the first scan: older logs are bounded
	buffer  []byte

	scanned   time.Time
	rootSeen  dirSeen
	openFiles int
	held      int  // bytes of lines without an end
	dirty     bool // some places are not saved

	checkpoint *checkpoint.File[state]

	mu      sync.Mutex
	numbers numbers
	problem string
	logged  time.Time
}

const (
	// period is how often files are checked, scanPeriod how often folders are.
	period     = 250 * time.Millisecond
	scanPeriod = time.Second
	// retryPeriod is how long to wait when the store takes no lines.
	retryPeriod = time.Second
)

// New returns a Tailer with the saved state.
func New(opts Options) *Tailer {
	if opts.Root == "" {
		opts.Root = "/var/log/pods"
	}
	if opts.LinesPerSecond == 0 {
		opts.LinesPerSecond = 2000
	}
	if opts.History == 0 {
		opts.History = 16 << 20
	}
	saved := checkpoint.New[state](opts.State, opts.Store)
	st, found, err := saved.Load()
	if err != nil {
		// Without the state the logs are read again; lines that are already stored are recognised.
		opts.Log.Warn("the places in the pods' logs were forgotten", "error", err)
	}
	return &Tailer{
		opts: opts, state: &st, checkpoint: saved, first: !found, root: -1, pods: map[string]*pod{},
		started: time.Now(), buffer: make([]byte, readBytes),
	}
}

// Run reads until the context ends.
func (t *Tailer) Run(ctx context.Context) error {
	defer t.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		wait := period
		more, err := t.round(ctx)
		switch {
		case ctx.Err() != nil:
			continue
		case errors.Is(err, rowstore.ErrClosed):
			return fmt.Errorf("reading the pods' logs: %w", err)
		case err != nil:
			t.setProblem(fmt.Sprintf("the pods' logs wait: %v", err))
			wait = retryPeriod
		case more:
			wait = 0
		}
		timer.Reset(wait)
	}
}

// round reads everything once. more means that there is more to read immediately.
func (t *Tailer) round(ctx context.Context) (more bool, err error) {
	now := time.Now()
	if now.Sub(t.scanned) >= scanPeriod {
		t.scanned = now
		t.setProblem("")
		if err := t.scan(now); err != nil {
			t.setProblem(err.Error())
		}
	}
	for _, p := range t.pods {
		for _, c := range p.containers {
			for _, f := range c.reading() {
				if ctx.Err() != nil {
					return false, ctx.Err()
				}
				full, err := t.read(ctx, p, c, f, now)
				if err != nil {
					return false, err
				}
				if full {
					more = true
					break // the container's next file only after this one
				}
			}
			if err := t.reportDropped(p, c, now); err != nil {
				return false, err
			}
		}
	}
	if err := t.save(); err != nil {
		t.setProblem(err.Error())
	}
	return more, nil
}

// Numbers counts since New: pods and files (now), lines (stored), dropped (above LinesPerSecond), refused (by the store: too old, or
// too many streams), malformed (not in containerd's format; stored as they are) and ignored (names in the folder that do not belong to a pod, now).
func (t *Tailer) Numbers() map[string]int64 {
	n := t.counts()
	return map[string]int64{
		"pods": n.pods, "files": n.files, "lines": n.lines, "dropped": n.dropped, "refused": n.refused, "malformed": n.malformed, "ignored": n.ignored,
	}
}

func (t *Tailer) counts() numbers {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.numbers
}

// Problem says why lines are not stored, empty if they are.
func (t *Tailer) Problem() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.problem
}

// logProblems is how often a problem is logged. The first of several problems may change each time.
const logProblems = time.Minute

func (t *Tailer) setProblem(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.problem = text
	if now := time.Now(); text != "" && now.Sub(t.logged) >= logProblems {
		t.logged = now
		t.opts.Log.Warn("reading pods' logs", "problem", text)
	}
}

func (t *Tailer) count(change func(*numbers)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.numbers)
}

func (t *Tailer) close() {
	for _, p := range t.pods {
		p.close()
	}
	if t.root >= 0 {
		_ = unix.Close(t.root)
		t.root = -1
	}
}
