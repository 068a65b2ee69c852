// Package journal reads what the platform itself writes on this machine, the server's and containerd's logs and what the kernel says of processes that it
// killed for want of memory, into a Store.
//
// It owns how far it has read and remembers it on disk when the lines before are on disk. After the program was killed it reads the last seconds
// again and leaves out what is stored already. Containers' logs are podlogs', events are the informers'.
package journal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"polymesh.dev/polymesh/observe/checkpoint"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
)

// Values of the label job.
const (
	JobPolymesh = "polymesh" // the platform's programs; the label container says which
	JobKernel   = "kernel"
)

// Metadata of the kernel's lines, when they have it.
const (
	MetaUID     = "uid"     // of the pod
	MetaPID     = "pid"     // of the killed process
	MetaProcess = "process" // its name
)

// Store keeps lines: a logstore.Store, or the buffer for one on another machine (push.Buffer).
type Store interface {
	Append([]logstore.Entry) error
	Each(context.Context, logstore.Selector, func(logstore.Entry) bool) error
	checkpoint.Store
}

// Options say what is read.
type Options struct {
	// Node is the name of this machine, for the label.
	Node  string
	Store Store
	// State is the file that remembers how far each log was read.
	State string
	// Files are the programs' logs. The store's own log must not be among them: storing it would write to it again.
	Files []File
	// Kernel is the kernel's log, /dev/kmsg when empty.
	Kernel string
	// LinesPerSecond is how many lines of one file are kept, 2,000 when zero. More are counted and dropped.
	LinesPerSecond int
	Log            *slog.Logger
}

// File is a program's log. It need not exist yet.
type File struct {
	Name string // the label container
	Path string
}

const (
	period      = 500 * time.Millisecond
	retryPeriod = time.Second
)

// Journal reads the logs. It cannot run again after Run has ended.
type Journal struct {
	opts    Options
	started time.Time
	files   []*file
	kernel  *kernel
	buffer  []byte

	dirty      bool // some places are not saved
	checkpoint *checkpoint.File[state]

	mu      sync.Mutex
	lines   int64
	dropped int64
	refused int64
	problem string
}

// New returns a Journal with the saved state.
func New(opts Options) *Journal {
	if opts.Kernel == "" {
		opts.Kernel = "/dev/kmsg"
	}
	if opts.LinesPerSecond == 0 {
		opts.LinesPerSecond = 2000
	}
	saved := checkpoint.New[state](opts.State, opts.Store)
	st, _, err := saved.Load()
	if err != nil {
		// Without the state the logs are read again; lines that are already stored are recognised.
		opts.Log.Warn("the places in the platform's logs were forgotten", "error", err)
	}
	j := &Journal{opts: opts, started: time.Now(), buffer: make([]byte, readBytes), checkpoint: saved}
	for _, f := range opts.Files {
		j.files = append(j.files, newFile(f, st.Files[f.Name], opts.LinesPerSecond))
	}
	j.kernel = newKernel(opts.Kernel, st.Kernel)
	return j
}

// Run reads until the context ends.
func (j *Journal) Run(ctx context.Context) error {
	defer j.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		wait := period
		more, err := j.round(ctx)
		switch {
		case ctx.Err() != nil:
			continue
		case errors.Is(err, rowstore.ErrClosed):
			return fmt.Errorf("reading the platform's logs: %w", err)
		case err != nil:
			wait = retryPeriod
		case more:
			wait = 0
		}
		j.setProblem(err)
		timer.Reset(wait)
	}
}

// round reads everything once. more means that there is more to read immediately. A log that cannot be read does not hold up the others.
func (j *Journal) round(ctx context.Context) (more bool, err error) {
	var problems []error
	for _, f := range j.files {
		full, err := j.readFile(ctx, f)
		problems = append(problems, err)
		more = more || full
	}
	problems = append(problems, j.readKernel(ctx), j.save())
	return more, errors.Join(problems...)
}

// store appends lines to the store. Lines that the store rejects are counted and left out.
func (j *Journal) store(entries []logstore.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	err := j.opts.Store.Append(entries)
	var refused *rowstore.RejectedError
	if errors.As(err, &refused) {
		j.count(0, 0, int64(refused.Rows))
		err = nil
	}
	if err == nil {
		j.count(int64(len(entries)), 0, 0)
		j.dirty = true
	}
	return err
}

func (j *Journal) count(lines, dropped, refused int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines += lines - refused
	j.dropped += dropped
	j.refused += refused
}

// Numbers counts lines since New.
func (j *Journal) Numbers() map[string]int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return map[string]int64{"lines": j.lines, "dropped": j.dropped, "refused": j.refused}
}

// Problem says why lines are not stored, empty if they are.
func (j *Journal) Problem() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.problem
}

func (j *Journal) setProblem(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if text != "" && text != j.problem {
		j.opts.Log.Warn("reading the platform's logs", "problem", text)
	}
	j.problem = text
}

func (j *Journal) close() {
	for _, f := range j.files {
		f.close()
	}
	j.kernel.close()
}
