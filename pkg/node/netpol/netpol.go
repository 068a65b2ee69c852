// Package netpol enforces NetworkPolicies for the pods of one node, with rules of nftables.
//
// It owns the packet filter table layout.PolicyTable. It reads pods, namespaces and policies from the API server, compiles them to a
// table (Compile, a pure function), and writes to the kernel what has changed. The rules stay in force when the process ends. Every
// node, server or agent, has one component; pkg/server adds it to a server's.
//
// It is our own because no kept implementation fits: kube-network-policies (sigs.k8s.io) needs NFQUEUE, which not every kernel has,
// and lets all packets pass, or removes its rules, while its process restarts; kube-router is bound to iptables and ipset. Tests
// compare it with the evaluator of the former, and with upstream's end-to-end tests.
package netpol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/preflight"
)

// shownProblems is how many policies with problems the notes name.
const shownProblems = 3

// Options are the settings of the component.
type Options struct {
	// Node is this node's name in the cluster.
	Node string
	// Kubeconfig is a file with an identity that may list and watch pods, namespaces and networkpolicies: the node's own. It is read
	// by Start.
	Kubeconfig string
	// Network is the name of the pod network, by which its records are found (layout.DataDir.PodNetwork).
	Network string
	// Disabled is set to remove the rules instead.
	Disabled bool
	Log      *slog.Logger
}

const (
	// checkInterval is as pkg/node's for other parts of the network.
	checkInterval = 10 * time.Second
	// retryInterval is the pause after a failure.
	retryInterval = time.Second
	// writeTimeout bounds one run of nft.
	writeTimeout = 30 * time.Second
	// restShare bounds the work for a stream of changes to a fifth of one processor: after each pass it rests four times as long.
	restShare = 4
)

var (
	_ component.Component  = (*Component)(nil)
	_ component.Noted      = (*Component)(nil)
	_ component.Summarized = (*Component)(nil)
)

// Component is the component "network-policy".
type Component struct {
	component.Background
	opts    Options
	log     *slog.Logger
	records string
	// interval is how often to check whether another program has removed the rules.
	interval time.Duration
	// supported is false on kernels on which kube-proxy uses iptables.
	supported bool

	sources sources
	kernel  *kernel // nil until nft was found to work
	changed chan struct{}

	mu       sync.Mutex
	state    error
	problems []error // of policies, by which they are not enforced in full
	policies int
	isolated int
	restored string
}

// New returns the component, not yet started.
func New(o Options) *Component {
	return &Component{
		opts: o, log: o.Log.With("component", "network-policy"), records: recordDir, interval: checkInterval, supported: preflight.NFTables(),
		changed: make(chan struct{}, 1), state: errors.New("not applied yet"),
	}
}

// Name implements component.Component.
func (c *Component) Name() string { return "network-policy" }

// Init does nothing: Start reads the kubeconfig.
func (c *Component) Init(context.Context) error { return nil }

// Start watches the cluster and keeps the rules, or removes them if the component is disabled. Until all is listed, rules of an
// earlier process stay as they are.
func (c *Component) Start(ctx context.Context) error {
	if c.opts.Disabled {
		c.Go(ctx, c.runDisabled)
		return nil
	}
	client, err := kubeconfig.Client(c.opts.Kubeconfig, func(config *rest.Config) {
		config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	})
	if err != nil {
		return err
	}
	if c.sources, err = newSources(client, c.kick); err != nil {
		return err
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the pods' networks: %w", err)
	}
	if err := c.watchRecords(watcher); err != nil {
		return errors.Join(err, watcher.Close())
	}
	c.Go(ctx, func(ctx context.Context) {
		var running sync.WaitGroup
		defer running.Wait()
		running.Go(func() { c.follow(ctx, watcher) })
		c.run(ctx, func(s *source) {
			running.Go(func() { s.RunWithContext(ctx) })
			running.Go(func() {
				if cache.WaitFor(ctx, "", s.HasSyncedChecker()) {
					c.kick()
				}
			})
		})
	})
	return nil
}

// watchRecords watches the folder of the records, and creates it as libcni does.
func (c *Component) watchRecords(watcher *fsnotify.Watcher) error {
	err := os.MkdirAll(c.records, 0o700)
	if err == nil {
		err = watcher.Add(c.records)
	}
	if err != nil {
		return fmt.Errorf("watch %s, the pods' networks: %w", c.records, err)
	}
	return nil
}

// follow reports changes of the records.
func (c *Component) follow(ctx context.Context, watcher *fsnotify.Watcher) {
	defer watcher.Close()
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case err = <-watcher.Errors:
			// Events were lost, for example because there were too many.
		case event := <-watcher.Events:
			// A reset of another data dir removes the folder when it is empty.
			if event.Name == c.records && event.Has(fsnotify.Remove|fsnotify.Rename) {
				err = c.watchRecords(watcher)
			}
		}
		if err != nil {
			c.log.Warn("new pods may get no packets until the API has their addresses", "err", err)
		}
		c.kick()
	}
}

func (c *Component) kick() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// run keeps the rules until ctx ends; they stay then. watch starts to watch a source.
func (c *Component) run(ctx context.Context, watch func(*source)) {
	watch(c.sources.policies)
	watchesAll := false
	check := time.NewTicker(c.interval)
	defer check.Stop()
	for {
		begin := time.Now()
		if !watchesAll && len(c.sources.policies.GetStore().ListKeys()) > 0 && c.supported {
			watchesAll = true
			watch(c.sources.namespaces)
			watch(c.sources.pods)
		}
		err := c.pass(ctx)
		pause := restShare * time.Since(begin)
		var list waiting
		waits := errors.As(err, &list)
		c.mu.Lock()
		if err != nil && c.state == nil && (!waits || list.failure != nil) && ctx.Err() == nil {
			c.log.Error("NetworkPolicies are not up to date, what was in force before stays", "err", err)
		}
		c.state = err
		c.mu.Unlock()
		if err != nil && !waits {
			pause = max(pause, retryInterval)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		if err != nil && !waits {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-c.changed:
		case <-check.C:
			c.check(ctx)
		}
	}
}

// runDisabled removes rules of an earlier run.
func (c *Component) runDisabled(ctx context.Context) {
	for {
		var err error
		if c.supported {
			err = c.write(ctx, newTable())
		}
		c.mu.Lock()
		c.state = err
		c.mu.Unlock()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
	}
}

// pass brings the kernel's rules to the state of the cluster's policies.
func (c *Component) pass(ctx context.Context) error {
	if err := c.sources.policies.waiting(); err != nil {
		return err
	}
	policies := len(c.sources.policies.GetStore().ListKeys())
	if !c.supported {
		c.note(policies, 0, nil)
		return nil
	}
	if policies == 0 {
		c.note(0, 0, nil)
		return c.write(ctx, newTable())
	}
	for _, s := range []*source{c.sources.namespaces, c.sources.pods} {
		if err := s.waiting(); err != nil {
			return err
		}
	}
	attached, err := attachments(c.records, c.opts.Network)
	if err != nil {
		return err
	}
	table, problems := Compile(c.sources.cluster(c.opts.Node, attached))
	if err := c.write(ctx, table); err != nil {
		return err
	}
	c.note(policies, table.Isolated, problems)
	return nil
}

func (c *Component) write(ctx context.Context, table *Table) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if c.kernel == nil {
		nft, err := knftables.New(knftables.InetFamily, layout.PolicyTable)
		if err != nil {
			return fmt.Errorf("NetworkPolicies need nft, which does not work: %w", err)
		}
		c.kernel = &kernel{nft: nft}
	}
	return c.kernel.apply(ctx, table)
}

// check notices when another program has removed the rules; the next pass writes all of them.
func (c *Component) check(ctx context.Context) {
	if c.kernel == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	missing, err := c.kernel.missing(ctx)
	if err != nil && ctx.Err() == nil {
		c.log.Error("check the rules of NetworkPolicies", "err", err)
	}
	if missing {
		c.log.Warn("another program has removed the rules of NetworkPolicies, restoring them")
		c.mu.Lock()
		c.restored = time.Now().Format(time.DateTime) + ": put back what another program had removed: the rules of NetworkPolicies"
		c.mu.Unlock()
	}
}

func (c *Component) note(policies, isolated int, problems []error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.policies, c.isolated, c.problems = policies, isolated, problems
}

// Ready returns nil when the rules in the kernel are those of the cluster's policies. The kubelet waits for that: no pod starts
// before its policies are in force.
func (c *Component) Ready(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Notes returns what an administrator should know although the component is ready.
func (c *Component) Notes(context.Context) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var notes []string
	if !c.supported && c.policies > 0 {
		notes = append(notes, count(c.policies)+" stored and not enforced, which needs Linux 5.13")
	}
	for _, err := range c.problems[:min(len(c.problems), shownProblems)] {
		notes = append(notes, err.Error())
	}
	if more := len(c.problems) - shownProblems; more > 0 {
		notes = append(notes, fmt.Sprintf("NetworkPolicies with problems that are not shown: %d", more))
	}
	return append(notes, component.Present(&c.restored)...)
}

// Summary returns how many policies are enforced.
func (c *Component) Summary() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.opts.Disabled:
		return "disabled"
	case c.policies == 0 || !c.supported:
		return ""
	case c.isolated == 1:
		return count(c.policies) + " enforced, for 1 pod of this node"
	}
	return fmt.Sprintf("%s enforced, for %d pods of this node", count(c.policies), c.isolated)
}

// count is a number of policies as the subject of a sentence.
func count(policies int) string {
	if policies == 1 {
		return "1 NetworkPolicy is"
	}
	return fmt.Sprintf("%d NetworkPolicies are", policies)
}
