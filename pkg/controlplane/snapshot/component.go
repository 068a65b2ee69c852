package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"time"

	"github.com/robfig/cron/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/version"
)

const (
	// jitter is the most by which a scheduled snapshot is late, so that not all servers of a cluster save at once.
	jitter = time.Minute
	// retry is how often a scheduled snapshot that has failed is tried again until the next one is due.
	retry = 10 * time.Minute
	// formerRetry is how often the former node is looked for while the API server does not respond.
	formerRetry = 10 * time.Second
)

// Schedule is when a component saves snapshots, and how many it keeps.
type Schedule struct {
	// Cron is a cron expression of five fields, in local time. Empty for no snapshots.
	Cron string
	// Healthy returns nil if this server's datastore is complete; nil if it always is. There is no scheduled snapshot while it is not.
	Healthy func(context.Context) error
	// Retention is how many snapshots of each automatic name are kept.
	Retention int
}

// Component is "snapshots": it saves snapshots on a schedule, and completes the restore of one from another machine.
type Component struct {
	component.Background
	snapshots  *Snapshots
	schedule   Schedule
	kubeconfig string
	log        *slog.Logger

	cron   cron.Schedule
	last   atomic.Pointer[error]  // of the last scheduled snapshot; nil if it was saved
	former atomic.Pointer[string] // a warning about the node of a restored snapshot; nil for none
}

var _ component.Component = (*Component)(nil)

// NewComponent returns the component, not yet started. The kubeconfig must allow reading and deleting nodes, and reading their leases.
func NewComponent(s *Snapshots, schedule Schedule, kubeconfig string, log *slog.Logger) *Component {
	c := &Component{snapshots: s, schedule: schedule, kubeconfig: kubeconfig}
	c.log = log.With("component", c.Name())
	return c
}

// Name implements component.Component.
func (*Component) Name() string { return "snapshots" }

// Init implements component.Component.
func (c *Component) Init(context.Context) (err error) {
	if c.schedule.Cron == "" {
		return nil
	}
	if c.cron, err = cron.ParseStandard(c.schedule.Cron); err != nil {
		return fmt.Errorf("--snapshot-schedule: %w", err)
	}
	return nil
}

// Start waits for the schedule in the background.
func (c *Component) Start(ctx context.Context) error {
	c.Go(ctx, func(ctx context.Context) {
		c.finish(ctx)
		if c.cron == nil {
			<-ctx.Done()
			return
		}
		for next := c.cron.Next(time.Now()); wait(ctx, time.Until(next)+rand.N(jitter)); next = c.cron.Next(time.Now()) {
			c.scheduled(ctx)
		}
	})
	return nil
}

// wait reports whether d has passed before ctx has ended.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// scheduled saves one snapshot, and tries again until the next one is due.
func (c *Component) scheduled(ctx context.Context) {
	due := c.cron.Next(time.Now())
	for {
		err := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			c.last.Store(nil)
			return
		}
		c.last.Store(&err)
		c.log.Error("the scheduled snapshot failed", "err", err)
		if time.Until(due) < retry || !wait(ctx, retry) {
			return
		}
	}
}

// once saves a scheduled snapshot and removes old ones.
func (c *Component) once(ctx context.Context) error {
	if c.schedule.Healthy != nil {
		if err := c.schedule.Healthy(ctx); err != nil {
			return fmt.Errorf("the datastore of this server is not healthy: %w", err)
		}
	}
	info, err := c.snapshots.Save(ctx, Scheduled)
	if info != nil {
		c.log.Info("saved a snapshot", "path", info.Path, "bytes", info.Size, "revision", info.Revision)
	}
	if err != nil {
		return err
	}
	done, err := c.snapshots.Prune(ctx, c.schedule.Retention, automatic()...)
	for _, old := range done.Removed {
		c.log.Info("removed an old snapshot", "path", old.Path)
	}
	if n := len(done.Unknown); n > 0 {
		c.log.Info("old snapshots stay, because nothing shows that they are of this cluster: `polymesh snapshot ls -o json` shows those without a cluster, and `polymesh snapshot delete` removes one", "snapshots", n)
	}
	return err
}

// Ready implements component.Component. A server without a recent snapshot still works, see Notes.
func (c *Component) Ready(context.Context) error { return nil }

// Notes implements component.Noted: the last scheduled snapshot failed.
func (c *Component) Notes(context.Context) []string {
	notes := component.Present(c.former.Load())
	if err := c.last.Load(); err != nil {
		notes = append(notes, fmt.Sprintf("the last scheduled snapshot failed: %v", *err))
	}
	return notes
}

// finish removes the node object of the machine that a restored snapshot is from, if this machine has another name. Its pods are bound
// to it, and would neither run nor be replaced while it exists.
func (c *Component) finish(ctx context.Context) {
	path := c.snapshots.o.DataDir.Server(noteName)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var n note
	if err == nil {
		err = json.Unmarshal(text, &n)
	}
	if err != nil {
		c.log.Error("read the note of a restored snapshot", "path", path, "err", err)
		return
	}
	for {
		err := c.removeFormer(ctx, n)
		if err == nil {
			break
		}
		c.log.Debug("the restored snapshot's node is not checked yet", "node", n.Node, "err", err)
		if !wait(ctx, formerRetry) {
			return
		}
	}
	if err := os.Remove(path); err != nil {
		c.log.Error("remove the note of a restored snapshot", "path", path, "err", err)
	}
}

// removeFormer removes the node of a restored snapshot, unless that node has reported since.
func (c *Component) removeFormer(ctx context.Context, n note) error {
	if n.Node == "" || n.Node == c.snapshots.o.Node {
		return nil
	}
	client, err := kubeconfig.Client(c.kubeconfig, nil)
	if err != nil {
		return err
	}
	node, err := client.CoreV1().Nodes().Get(ctx, n.Node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	lease, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, n.Node, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	if err == nil && lease.Spec.RenewTime != nil && lease.Spec.RenewTime.After(n.Restored) {
		text := fmt.Sprintf("node %s, whose server saved the restored snapshot, is part of this cluster: it stays", n.Node)
		c.former.Store(&text)
		return nil
	}
	err = client.CoreV1().Nodes().Delete(ctx, n.Node, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &node.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	c.log.Warn("removed the node whose server saved the restored snapshot: its pods are started on other nodes", "node", n.Node, "this node", c.snapshots.o.Node)
	return nil
}

// versionName is the file with the version that used a data dir last.
const versionName = "version"

// BeforeStart completes an interrupted restore, and saves a snapshot if another version has used the data dir before, or if the datastore
// moves to another one now. It is called
// with the lock of the data dir, before anything in it is read. With save false there is no snapshot.
func (s *Snapshots) BeforeStart(ctx context.Context, save bool, log *slog.Logger) error {
	completed, err := Recover(s.o.DataDir)
	if err != nil {
		return err
	}
	if completed {
		log.Info("completed the restore of a snapshot, which was interrupted")
	}
	// The server starts normally, so a later reset is another one.
	if err := os.Remove(resetFlag(s.o.DataDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if c, ok := s.o.Datastore.(Clustered); ok && save && c.Moving() {
		info, err := s.Save(ctx, BeforeDatastoreMove)
		if info == nil {
			return fmt.Errorf("the datastore cannot be saved before it moves to etcd: %w. To move it without a snapshot: --disable-snapshots", err)
		}
		log.Info("saved a snapshot before the datastore moves to etcd", "path", info.Path)
	}
	file := s.o.DataDir.Server(versionName)
	last, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if string(last) == version.Version {
		return nil
	}
	if used, err := hasEntries(s.content()); err != nil {
		return err
	} else if used && save {
		info, err := s.Save(ctx, BeforeUpgrade)
		if info == nil {
			return fmt.Errorf("another version of Polymesh has used %s, and its state cannot be saved before this one changes it: %w. To start without a snapshot: --disable-snapshots", s.o.DataDir, err)
		}
		if err != nil {
			log.Warn("the snapshot before the first start of this version", "err", err)
		}
		log.Info("saved a snapshot before the first start of this version", "path", info.Path, "former", string(last), "version", version.Version)
	}
	if err := atomicfile.MkdirAll(s.o.DataDir.Server(), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(file, []byte(version.Version), 0o600)
}

func hasEntries(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return len(entries) > 0, err
}
