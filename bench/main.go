// Command bench measures dist/polymesh, on its own nodes like those of the end-to-end tests, and writes the results
// to bench/README.md. `make bench` runs it. It needs root.
//
// Each run measures all parts, or those selected by -only; bench/results.json keeps the results of the others. A
// figure is reported as minimum, median and maximum of the runs. The program fails if Polymesh does not work, never because it
// is slow.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

type options struct {
	runs               int
	settle, idle, load time.Duration
	out                string
	only               string
	large              bool
}

// settings are the options that affect the figures.
func (o options) settings() string {
	return fmt.Sprintf("-settle %s -idle %s -load %s", seconds(o.settle), seconds(o.idle), seconds(o.load))
}

// part is a part of the measurements.
type part struct {
	name    string
	measure func(context.Context) error
	images  []string // scripts that build the images and programs it uses
	large   bool     // only with -large
}

const (
	testImages  = "test/e2e/images/build.sh"
	appImages   = "examples/polyglot/images.sh"
	benchImages = "bench/images.sh"
	programs    = "bench/programs.sh"
)

// parts are in the order of measurement.
func (b *bench) parts() []part {
	parts := []part{
		{name: "size of the file", measure: b.size},
		{name: "a server without Istio", measure: b.bare},
		{name: "a server with Istio's demo profile and the app", measure: b.mesh, images: []string{testImages, appImages}},
		{name: "the store of metrics, logs and traces", measure: b.store, images: []string{appImages}},
		{name: "an agent", measure: b.agent},
		{name: "servers with etcd at rest", measure: b.members},
		{name: "API under load", measure: b.api},
		{name: "network: pods of two nodes", measure: b.network, images: []string{programs}},
		{name: "failover: the only server", measure: b.failoverServer},
		{name: "failover: an agent", measure: b.failoverAgent},
		{name: "failover: three servers", measure: b.failoverServers},
		{name: "growth: 10 hollow nodes", measure: b.hollow(hollowSizes[0], stores...), images: []string{programs}},
		{name: "growth: 1,000 pods of kwok", measure: b.fakes(fakeSizes[0]), images: []string{programs}},
		{name: "growth: 5,000 pods of kwok", measure: b.fakes(fakeSizes[1]), images: []string{programs}},
		{name: "1 CPU and 512 MB without Istio", measure: b.smallBare, images: []string{testImages}},
		{name: "2 CPUs and 2 GB with Istio", measure: b.smallMesh, images: []string{appImages}},
		{name: "mesh: requests", measure: b.requests, images: []string{benchImages}},
		{name: "mesh: sidecars at rest", measure: b.sidecars, images: []string{testImages, benchImages}},
		{name: "mesh: istiod's pushes", measure: b.pushes},
		{name: "workflow: deploy, dev and five languages", measure: b.workflow, images: []string{testImages, appImages, benchImages}},
	}
	// One part for each datastore, because each takes ten minutes: what is measured is kept if the next one fails.
	for _, s := range stores {
		parts = append(parts, part{name: "growth: 100 hollow nodes, " + s.name, measure: b.hollow(hollowSizes[1], s), images: []string{programs}, large: true})
	}
	return parts
}

func main() {
	// Must be first: a second process of this program removes the nodes when this one is killed.
	if err := node.Guard(); err != nil {
		fail(err)
	}
	var o options
	var limit time.Duration
	flag.IntVar(&o.runs, "runs", 3, "how often everything is measured")
	flag.DurationVar(&o.settle, "settle", time.Minute, "rest before idle processes are measured")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long idle processes are measured")
	flag.DurationVar(&o.load, "load", 20*time.Second, "how long requests are sent at each rate")
	flag.StringVar(&o.only, "only", "", "measure only the part with this name, or those whose name contains this text; the report keeps earlier results of the others")
	flag.BoolVar(&o.large, "large", false, "measure the parts that need half an hour too: 100 hollow nodes")
	flag.StringVar(&o.out, "o", "", "file for the report (default: bench/README.md of the repository); results.json beside it keeps the figures")
	flag.DurationVar(&limit, "limit", 3*time.Hour, "give up after this time")
	flag.Parse()
	if flag.NArg() > 0 || o.runs < 1 {
		fail(errors.New("usage: bench [-runs N] [-only PART] [-large] [-settle D] [-idle D] [-load D] [-o FILE]"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func run(ctx context.Context, o options) error {
	top, err := node.Top()
	if err != nil {
		return err
	}
	if o.out == "" {
		o.out = filepath.Join(top, "bench", "README.md")
	}
	b := &bench{options: o, top: top}
	machine, err := describeMachine(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(filepath.Dir(o.out), "results.json")
	kept, err := readRecords(file)
	if err != nil {
		return err
	}
	chosen := b.parts()
	// A part's whole name means that part: "an agent" is in another one's name too.
	exact := slices.ContainsFunc(chosen, func(p part) bool { return p.name == o.only })
	chosen = slices.DeleteFunc(chosen, func(p part) bool {
		return exact && p.name != o.only || !strings.Contains(p.name, o.only) || p.large && !o.large
	})
	if len(chosen) == 0 {
		return fmt.Errorf("no part has %q in its name", o.only)
	}
	// Building is not measured, so it is done before.
	var scripts []string
	for _, p := range chosen {
		scripts = append(scripts, p.images...)
	}
	slices.Sort(scripts)
	for _, script := range slices.Compact(scripts) {
		b.say("%s", script)
		if out, err := exec.CommandContext(ctx, filepath.Join(top, script)).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
	}
	found := records{}
	for _, p := range chosen {
		found[p.name] = &record{Machine: machine, Settings: o.settings(), Results: newResults()}
	}
	for i := range o.runs {
		for _, p := range chosen {
			b.say("run %d of %d: %s", i+1, o.runs, p.name)
			r := found[p.name]
			load, err := loadAverage()
			if err != nil {
				return err
			}
			b.results, b.run = r.Results, i
			if err := p.measure(ctx); err != nil {
				return fmt.Errorf("run %d, %s: %w", i+1, p.name, err)
			}
			r.Load = append(r.Load, load)
			r.Runs++
			// Save results even if a later part fails.
			kept[p.name] = r
			if err := errors.Join(kept.write(file), os.WriteFile(o.out, []byte(report(b.parts(), kept)), 0o644)); err != nil {
				return err
			}
		}
	}
	b.say("written to %s", o.out)
	return nil
}

// bench is one run of the program.
type bench struct {
	options
	top string
	// run counts the runs, from 0.
	run int
	// results are those of the part that is currently measured.
	results *results
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

// on creates a node for f and removes it afterwards.
func (b *bench) on(ctx context.Context, o node.Options, f func(*node.Node) error) error {
	n, err := node.New(o)
	if err != nil {
		return err
	}
	err = f(n)
	if err != nil && ctx.Err() == nil {
		n.Explain(os.Stderr)
	}
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return errors.Join(err, n.Close(closing))
}

// closeLimit is the time to stop the servers of a part and remove what they have left.
const closeLimit = 3 * time.Minute

// closeCluster closes a cluster, also after ctx has ended, and adds its error to err.
func closeCluster(ctx context.Context, c *node.Cluster, err *error) {
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	*err = errors.Join(*err, c.Close(closing))
}

// startReady starts a node's server and waits until every component is ready.
func startReady(ctx context.Context, n *node.Node) error {
	if err := n.Start(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	return n.Ready(ctx)
}

func (b *bench) size(context.Context) error {
	program, err := node.Program()
	if err != nil {
		return err
	}
	info, err := os.Stat(program)
	if err != nil {
		return err
	}
	b.results.add(fileSize, float64(info.Size())/1e6)
	return nil
}

// polymesh runs a command of the program on the node.
func polymesh(ctx context.Context, n *node.Node, args ...string) error {
	if out, err := n.PolymeshCommand(ctx, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("polymesh %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// eventually retries until there is no error.
func eventually(ctx context.Context, n *node.Node, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not after %s: %w", limit, err)
		case <-n.Exited():
			return fmt.Errorf("the server has ended: %w", err)
		case <-time.After(poll):
		}
	}
}

// poll is the polling interval of conditions, and so the precision of times.
const poll = 50 * time.Millisecond
