//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// cutsInARound is how many cuts one machine gets: in its first start, under a load of writes, in a deploy, in an upgrade.
const cutsInARound = 10

// After a power failure at any moment the server comes up again with all that it has acknowledged. POLYMESH_POWER_CUTS is how
// many cuts there are, by default one round of ten.
func TestPowerCut(t *testing.T) {
	ownNodes(t, 1)
	cuts := cutsInARound
	seed := rand.Uint64()
	for name, set := range map[string]func(string) error{
		"POLYMESH_POWER_CUTS": func(text string) (err error) { cuts, err = strconv.Atoi(text); return err },
		"POLYMESH_E2E_SEED":   func(text string) (err error) { seed, err = strconv.ParseUint(text, 10, 64); return err },
	} {
		if text := os.Getenv(name); text != "" {
			if err := set(text); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	t.Logf("POLYMESH_E2E_SEED=%d makes the same random choices again", seed)
	for round := 0; round*cutsInARound < cuts; round++ {
		filesystem := []string{"ext4", "xfs"}[round%2]
		if !t.Run(fmt.Sprintf("round %d on %s", round+1, filesystem), func(t *testing.T) {
			(&powerCuts{T: t, random: rand.New(rand.NewPCG(seed, uint64(round)))}).round(filesystem)
		}) {
			return
		}
	}
}

// powerCuts is one machine, with its disk as it was at each cut.
type powerCuts struct {
	*testing.T
	random  *rand.Rand
	n       *node.Node
	disk    *node.Disk
	outages []outage
	// images and kept are what existed, and was acknowledged, at the last check; shipped are the images of every node.
	images, shipped programSizes
	kept            outage
}

// outage is a cut: the disk, and what was acknowledged before.
type outage struct {
	what string
	disk *node.Disk
	// images are the sizes of files in layers that containerd has recorded.
	images programSizes
	ledger map[string]entry
	// touched are objects with a write under way while the disk was copied.
	touched  map[string]bool
	revision uint64
	deployed bool
}

var powerCutArgs = []string{"--disable", "istio,metrics-server,local-storage"}

func (p *powerCuts) round(filesystem string) {
	disks := node.DisksForTest(p)
	p.disk = disks.New(p, filesystem)
	p.n = node.ForTest(p, node.Options{Args: powerCutArgs, Disk: p.disk})
	var boots []int
	for _, part := range []func(){p.firstStart, p.load, p.deploy, p.upgrade} {
		first := len(p.outages)
		part()
		boots = append(boots, p.chosen(first)...)
	}
	if err := p.n.Kill(); err != nil {
		p.Fatal(err)
	}
	if len(p.outages) != cutsInARound {
		p.Errorf("there were %d cuts, want %d", len(p.outages), cutsInARound)
	}
	for _, i := range boots {
		o := p.outages[i]
		p.Run(fmt.Sprintf("%d %s", i+1, strings.ReplaceAll(o.what, " ", "-")), func(t *testing.T) { p.boot(t, o) })
	}
}

// chosen returns on which of the disks that were cut from this one on, in one part of the round, a server is started: all, or with -short one by
// chance.
func (p *powerCuts) chosen(first int) (cuts []int) {
	if testing.Short() {
		return []int{first + p.random.IntN(len(p.outages)-first)}
	}
	for i := first; i < len(p.outages); i++ {
		cuts = append(cuts, i)
	}
	return cuts
}

// cut copies the disk now.
func (p *powerCuts) cut(o outage) {
	p.Helper()
	begin := time.Now()
	o.disk = p.disk.Cut(p)
	p.Logf("cut %d: %s, %s", len(p.outages)+1, o.what, time.Since(begin).Round(time.Millisecond))
	p.outages = append(p.outages, o)
}

// pause waits for a random moment.
func (p *powerCuts) pause(most time.Duration) {
	time.Sleep(time.Duration(p.random.Int64N(int64(most))))
}

func (p *powerCuts) firstStart() {
	if err := p.n.Start(p.Context()); err != nil {
		p.Fatal(err)
	}
	p.pause(8 * time.Second)
	p.cut(outage{what: "early in the first start"})
	// The moment at which programs in images were truncated: everything is recorded as complete.
	p.n.Eventually(p, 3*time.Minute, func() (bool, string) {
		report, err := p.n.Report(p.Context())
		if err != nil {
			return false, err.Error()
		}
		for _, c := range report.Components {
			if c.Name == "images" {
				return c.State == "Ready", fmt.Sprint(c.State, c.Message)
			}
		}
		return false, "images is not among the components"
	})
	p.images = layerFiles(p, p.n)
	p.shipped = maps.Clone(p.images)
	p.pause(2 * time.Second)
	p.cut(outage{what: "images are there", images: p.images})
	p.n.WaitReady(p, 3*time.Minute)
}

// entry is an object as it was acknowledged last.
type entry struct {
	version uint64
	value   string
	there   bool
}

// ledger is what was acknowledged to writers.
type ledger struct {
	mu      sync.Mutex
	entries map[string]entry
	flying  map[string]bool
	touched map[string]bool
	newest  uint64
	failure error
}

func (l *ledger) begin(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flying[name], l.touched[name] = true, true
}

func (l *ledger) end(name string, e entry, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.flying, name)
	if err != nil {
		l.failure = fmt.Errorf("%s: %w", name, err)
		return
	}
	l.entries[name], l.newest = e, max(l.newest, e.version)
}

// write creates, updates and deletes until ctx ends.
func (l *ledger) write(ctx context.Context, client corev1client.ConfigMapInterface, writer int, random *rand.Rand) {
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("w%d-%d", writer, i)
		value := text(random)
		l.begin(name)
		m, err := client.Create(context.WithoutCancel(ctx), configMap(name, value), metav1.CreateOptions{})
		var e entry
		if err == nil {
			var o object
			o, err = objectOf(m)
			e = entry{o.version, value, true}
		}
		l.end(name, e, err)
		if err != nil {
			return
		}
		switch random.IntN(4) {
		case 0:
			l.begin(name)
			err = client.Delete(context.WithoutCancel(ctx), name, metav1.DeleteOptions{})
			l.end(name, entry{version: e.version}, err)
		case 1:
			m.Data["value"] = text(random)
			l.begin(name)
			if m, err = client.Update(context.WithoutCancel(ctx), m, metav1.UpdateOptions{}); err == nil {
				var o object
				o, err = objectOf(m)
				e = entry{o.version, o.data, true}
			}
			l.end(name, e, err)
		}
		if err != nil {
			return
		}
	}
}

func (p *powerCuts) load() {
	p.n.Kubectl(p, "create", "namespace", crashNamespace)
	client := writerClient(p.T, p.n)
	l := &ledger{entries: map[string]entry{}, flying: map[string]bool{}, touched: map[string]bool{}}
	ctx, stop := context.WithTimeout(p.Context(), 2*time.Minute)
	defer stop()
	var writers sync.WaitGroup
	for w := range crashWriters {
		own := rand.New(rand.NewPCG(p.random.Uint64(), uint64(w)))
		writers.Go(func() { l.write(ctx, client, w, own) })
	}
	for range 4 {
		p.pause(3 * time.Second)
		p.cutUnder(l, "load of writes")
	}
	stop()
	writers.Wait()
	if l.failure != nil {
		p.Fatal(l.failure)
	}
	p.kept = outage{ledger: l.entries, revision: l.newest}
}

// cutUnder cuts while the ledger is written.
func (p *powerCuts) cutUnder(l *ledger, what string) {
	l.mu.Lock()
	o := outage{what: what, images: p.images, ledger: maps.Clone(l.entries), revision: l.newest}
	l.touched = maps.Clone(l.flying)
	l.mu.Unlock()
	p.cut(o)
	l.mu.Lock()
	defer l.mu.Unlock()
	p.outages[len(p.outages)-1].touched = maps.Clone(l.touched)
	p.Logf("%d objects were acknowledged, the newest resourceVersion is %d, %d writes were under way", len(o.ledger), o.revision, len(l.touched))
}

// cutAfter cuts when no write is under way, so that all of them count.
func (p *powerCuts) cutAfter(what string, deployed bool) {
	o := p.kept
	o.what, o.images, o.deployed = what, p.images, deployed
	p.cut(o)
}

const powerCutDeployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo, namespace: default}
spec:
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: echo, image: "` + echoImage + `", imagePullPolicy: Never}]
`

// deploy imports an image and applies what runs it, as polymesh deploy does with the images that it has built.
func (p *powerCuts) deploy() {
	archive, err := buildEcho()
	if err != nil {
		p.Fatal(err)
	}
	imported := make(chan error, 1)
	go func() {
		cmd := p.n.PolymeshCommand(p.Context(), "ctr", "images", "import", archive)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		imported <- err
	}()
	p.pause(2 * time.Second)
	p.cutAfter("image is imported", false)
	if err := <-imported; err != nil {
		p.Fatal(err)
	}
	p.images = layerFiles(p, p.n)
	p.n.Apply(p, powerCutDeployment)
	p.pause(3 * time.Second)
	p.cutAfter("image was imported and applied", true)
	p.n.WaitRollout(p, "default", "deployment/echo")
}

// upgrade starts a server that has to unpack its programs first, as after an upgrade. A second release would take another
// build; this one's programs are removed instead.
func (p *powerCuts) upgrade() {
	if err := p.n.Stop(p.Context()); err != nil {
		p.Fatal(err)
	}
	if err := os.RemoveAll(p.n.Layout().Path("data")); err != nil {
		p.Fatal(err)
	}
	if err := p.n.Start(p.Context()); err != nil {
		p.Fatal(err)
	}
	p.pause(5 * time.Second)
	p.cutAfter("programs are unpacked", true)
	p.pause(8 * time.Second)
	p.cutAfter("upgraded server starts", true)
	p.n.WaitReady(p, 3*time.Minute)
}

// boot starts a server on the disk after a cut, and checks that everything exists.
func (p *powerCuts) boot(t *testing.T, o outage) {
	// Before a server can repair anything: everything recorded exists.
	// It has the address of the machine that was cut: the first of a cluster always has the same one.
	n := node.ForTest(t, node.Options{Args: powerCutArgs, Disk: o.disk})
	o.images.want(t, layerFiles(t, n))
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	n.WaitReady(t, 4*time.Minute)
	t.Logf("every component was ready after %s", time.Since(begin).Round(100*time.Millisecond))
	// Components are ready with the images that they need; all of them must be intact.
	shipped := maps.Clone(p.shipped)
	maps.Copy(shipped, o.images)
	shipped.want(t, layerFiles(t, n))
	if o.ledger != nil {
		o.check(t, writerClient(t, n))
	}
	if o.deployed {
		n.WaitRollout(t, "default", "deployment/echo")
	}
}

// check compares the objects with the ledger.
func (o outage) check(t *testing.T, client corev1client.ConfigMapInterface) {
	t.Helper()
	list, err := client.List(t.Context(), metav1.ListOptions{LabelSelector: "app=journal"})
	if err != nil {
		t.Fatal(err)
	}
	if now, err := strconv.ParseUint(list.ResourceVersion, 10, 64); err != nil || now < o.revision {
		t.Errorf("the resourceVersion has gone back to %s (%v); %d was acknowledged", list.ResourceVersion, err, o.revision)
	}
	have := map[string]entry{}
	for i := range list.Items {
		got, err := objectOf(&list.Items[i])
		if err != nil {
			t.Fatal(err)
		}
		have[list.Items[i].Name] = entry{got.version, got.data, true}
	}
	lost := 0
	for name, want := range o.ledger {
		got, there := have[name]
		switch {
		case o.touched[name] && (!there || got.version >= want.version):
		case want.there && got == want:
		case !want.there && !there:
		default:
			if lost++; lost <= 10 {
				t.Errorf("%s was acknowledged as %s, and is %s", name, want.brief(), got.brief())
			}
		}
	}
	if lost > 0 {
		t.Fatalf("%d of %d acknowledged objects are not as they were", lost, len(o.ledger))
	}
	// A number is not used again.
	const after = "after-the-cut"
	if err := client.Delete(t.Context(), after, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	m, err := client.Create(t.Context(), configMap(after, "x"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := objectOf(m); err != nil || got.version <= o.revision {
		t.Errorf("a new object has resourceVersion %d (%v); %d was used before the cut", got.version, err, o.revision)
	}
	t.Logf("%d acknowledged objects are as they were", len(o.ledger))
}

func (e entry) brief() string {
	if !e.there {
		return "not there"
	}
	return fmt.Sprintf("resourceVersion %d, %d bytes %.8s…", e.version, len(e.value), e.value)
}

// programSizes are the sizes that large files of this name have, over all layers of images.
type programSizes map[string][]int64

// largeFile is the minimum size of a file in a layer that is checked, in bytes: programs, not what a container writes.
const largeFile = 1 << 20

// layerFiles checks the layers of a node's images on its disk.
func layerFiles(t testing.TB, n *node.Node) programSizes {
	t.Helper()
	found := programSizes{}
	layers, err := filepath.Glob(n.Layout().Agent("containerd", "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range layers {
		err := filepath.WalkDir(layer, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			info, err := d.Info()
			if err != nil || info.Size() < largeFile {
				return err
			}
			name, err := filepath.Rel(layer, path)
			if err == nil && !slices.Contains(found[name], info.Size()) {
				found[name] = append(found[name], info.Size())
			}
			return err
		})
		// A layer that is being created, or a container that ends, may disappear meanwhile.
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	return found
}

// want reports what is missing or short.
func (f programSizes) want(t *testing.T, have programSizes) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(f)) {
		for _, size := range f[name] {
			if !slices.Contains(have[name], size) {
				t.Errorf("%s in an image has sizes %d, want one of %d bytes", name, have[name], size)
			}
		}
	}
}
