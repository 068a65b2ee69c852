//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	crashRounds    = 9    // after the one in the first start
	shortRounds    = 3    // with -short: TestPowerCut is harder on the same data
	crashWrites    = 1000 // acknowledged in each of them, at least
	crashWriters   = 8
	crashNamespace = "e2e-journal"
	// writerObjects is how many objects one writer keeps, so that it updates and deletes as often as it creates.
	writerObjects = 40
)

// What the API server has acknowledged is there after a kill -9, ten times (with -short, four), and pods serve meanwhile.
func TestCrash(t *testing.T) {
	ownNodes(t, 1)
	seed := rand.Uint64()
	if text := os.Getenv("POLYMESH_E2E_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("POLYMESH_E2E_SEED: %v", err)
		}
	}
	t.Logf("POLYMESH_E2E_SEED=%d makes the same random choices again", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	n := node.ForTest(t, node.Options{FirstStart: true, Args: []string{"--disable", "istio,metrics-server,local-storage"}})
	nft := shippedNFT(t)
	before := look(t, n, nft)
	killFirstStart(t, n, random)

	rounds := crashRounds
	if testing.Short() {
		rounds = shortRounds
	}
	j := journal{objects: map[string]object{}, doubts: map[string]object{}}
	var p *prober
	for round := range rounds {
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitAPI(t, n)
		client := writerClient(t, n)
		if round == 0 {
			n.WaitReady(t, 3*time.Minute)
			deploySurvivors(t, n)
			p = probe(t, n)
			n.Kubectl(t, "create", "namespace", crashNamespace)
		}
		j.check(t, client)
		j.begin()
		enough := crashWrites + random.IntN(crashWrites/2)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		var writers sync.WaitGroup
		for w := range crashWriters {
			own := rand.New(rand.NewPCG(seed, uint64(1+round*crashWriters+w)))
			writers.Go(func() { j.write(ctx, client, fmt.Sprintf("w%d", w), own) })
		}
		err := j.reach(ctx, n, enough)
		if err == nil {
			err = n.Kill()
		}
		cancel()
		writers.Wait()
		if err != nil {
			t.Fatal(err)
		}
		t.Log(j.summary(round))
	}

	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 2*time.Minute)
	j.check(t, writerClient(t, n))
	p.more(t, 20)
	p.noneFailed(t)
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/server", "pod/victim", "-n", "e2e-restart", "--timeout=60s")
	for _, line := range containers(t, n) {
		if strings.Contains(line, "e2e-restart/server") && !strings.Contains(line, " 0 restarts") {
			t.Errorf("the pod that served was started again: %s", line)
		}
	}

	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	resetLeavesNothing(t, n, nft, before)
}

// killFirstStart kills the server while it makes its data dir: a random time after one of the marks on its way, and
// before the API is ready.
func killFirstStart(t *testing.T, n *node.Node, random *rand.Rand) {
	t.Helper()
	marks := []struct {
		file   string
		spread time.Duration
	}{
		{"data", 3 * time.Second},                      // the payload is being unpacked
		{"data/current", 300 * time.Millisecond},       // certificates are being made
		{"server/db", 200 * time.Millisecond},          // the components begin
		{"server/db/state.db", 500 * time.Millisecond}, // the API server starts on it
	}
	mark := marks[random.IntN(len(marks))]
	delay := time.Duration(random.Int64N(int64(mark.spread)))
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(n.Layout().Path(mark.file)); err == nil {
			break
		}
		select {
		case <-n.Exited():
			t.Fatal("the server has ended by itself")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server does not make %s", mark.file)
		}
	}
	time.Sleep(delay) // the random moment
	if err := apiReady(n); err == nil {
		t.Fatalf("the API was ready %s after %s was made: this kill comes too late", delay, mark.file)
	}
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the first start was killed %s after %s was made", delay, mark.file)
}

func apiReady(n *node.Node) error {
	client, err := n.NewClient()
	if err != nil {
		return err
	}
	body, err := client.RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background())
	if err == nil && string(body) != "ok" {
		err = fmt.Errorf("/readyz returns %q", body)
	}
	return err
}

func waitAPI(t *testing.T, n *node.Node) {
	t.Helper()
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		err := apiReady(n)
		return err == nil, fmt.Sprint(err)
	})
}

// writerClient has no limit on the number of requests.
func writerClient(t *testing.T, n *node.Node) corev1client.ConfigMapInterface {
	t.Helper()
	config, err := n.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client.CoreV1().ConfigMaps(crashNamespace)
}

// object is the API server's response about one ConfigMap. A missing one has no data.
type object struct {
	uid     types.UID
	version uint64
	data    string
	there   bool
}

func objectOf(m *corev1.ConfigMap) (object, error) {
	version, err := strconv.ParseUint(m.ResourceVersion, 10, 64)
	return object{m.UID, version, m.Data["value"], true}, err
}

// journal is what was acknowledged: the last state of each object, also of those that were deleted. An operation whose
// answer was lost is a doubt: the object is as before, or as the operation wanted it.
type journal struct {
	mu      sync.Mutex
	objects map[string]object
	doubts  map[string]object
	// newest is the highest resourceVersion that was acknowledged, floor that of the rounds before.
	newest, floor uint64

	created, updated, deleted int // acknowledged in this round
	wrong                     []string
}

func (j *journal) begin() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.floor = j.newest
	j.created, j.updated, j.deleted = 0, 0, 0
}

func (j *journal) summary(round int) string {
	return fmt.Sprintf("kill %d: %d created, %d updated, %d deleted, %d without a response; newest resourceVersion %d",
		round+2, j.created, j.updated, j.deleted, len(j.doubts), j.newest)
}

// reach waits for a number of acknowledged writes in this round.
func (j *journal) reach(ctx context.Context, n *node.Node, writes int) error {
	for {
		j.mu.Lock()
		have, wrong := j.created+j.updated+j.deleted, slices.Clone(j.wrong)
		j.mu.Unlock()
		switch {
		case len(wrong) > 0:
			return fmt.Errorf("the API server rejected valid requests: %s", strings.Join(wrong, "; "))
		case have >= writes:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d writes are acknowledged: %w", have, writes, ctx.Err())
		case <-n.Exited():
			return fmt.Errorf("the server has ended after %d writes", have)
		case <-time.After(time.Millisecond):
		}
	}
}

// write creates, updates and deletes its own objects until requests fail. A writer never sends another request for an
// object whose state is unknown.
func (j *journal) write(ctx context.Context, client corev1client.ConfigMapInterface, writer string, random *rand.Rand) {
	live, made := j.of(writer)
	for failures := 0; ctx.Err() == nil && failures < 2; {
		at, name := -1, fmt.Sprintf("%s-%d", writer, made)
		if len(live) >= writerObjects || len(live) > writerObjects/2 && random.IntN(3) > 0 {
			at = random.IntN(len(live))
			name = live[at]
		}
		last := j.last(name)
		wanted := object{data: text(random), there: true}
		var got *corev1.ConfigMap
		var err error
		var count *int
		switch {
		case at < 0:
			made++
			count = &j.created
			got, err = client.Create(ctx, configMap(name, wanted.data), metav1.CreateOptions{})
		case random.IntN(3) == 0:
			count, wanted = &j.deleted, object{}
			version := strconv.FormatUint(last.version, 10)
			err = client.Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &last.uid, ResourceVersion: &version}})
		default:
			count = &j.updated
			m := configMap(name, wanted.data)
			m.UID, m.ResourceVersion = last.uid, strconv.FormatUint(last.version, 10)
			got, err = client.Update(ctx, m, metav1.UpdateOptions{})
		}
		if err == nil && got != nil {
			wanted, err = objectOf(got)
		}
		j.note(name, last, wanted, count, err)
		switch {
		case err != nil:
			failures++
			if at >= 0 {
				live = slices.Delete(live, at, at+1)
			}
		case at < 0:
			live = append(live, name)
		case !wanted.there:
			live = slices.Delete(live, at, at+1)
		}
	}
}

// of lists a writer's existing objects, and counts all that it has created.
func (j *journal) of(writer string) (live []string, made int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for name, o := range j.objects {
		if strings.HasPrefix(name, writer+"-") {
			made++
			if o.there {
				live = append(live, name)
			}
		}
	}
	slices.Sort(live)
	return live, made
}

func (j *journal) last(name string) object {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.objects[name]
}

// note records a response, or that there was none.
func (j *journal) note(name string, last, now object, count *int, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err) || apierrors.IsInvalid(err) {
			j.wrong = append(j.wrong, fmt.Sprintf("%s, last %s: %v", name, last.brief(), err))
		}
		j.doubts[name] = now
		return
	}
	if now.there && now.version <= max(j.floor, last.version) {
		j.wrong = append(j.wrong, fmt.Sprintf("%s: resourceVersion %d is not above that of the last round (%d) and of the object (%d)", name, now.version, j.floor, last.version))
	}
	j.newest = max(j.newest, now.version)
	j.objects[name] = now
	*count++
}

func configMap(name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "journal"}},
		Data:       map[string]string{"value": value},
	}
}

func text(random *rand.Rand) string {
	b := make([]byte, 1+random.IntN(2000))
	for i := range b {
		b[i] = byte('a' + random.IntN(26))
	}
	return string(b)
}

// check reads all objects, and determines those whose state was unknown.
func (j *journal) check(t *testing.T, client corev1client.ConfigMapInterface) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	list, err := client.List(ctx, metav1.ListOptions{LabelSelector: "app=journal"})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]object{}
	for i := range list.Items {
		if have[list.Items[i].Name], err = objectOf(&list.Items[i]); err != nil {
			t.Fatal(err)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	names := map[string]bool{}
	for _, keys := range []func(func(string, object) bool){maps.All(have), maps.All(j.objects), maps.All(j.doubts)} {
		for name := range keys {
			names[name] = true
		}
	}
	done := 0
	for name := range names {
		got, last := have[name], j.objects[name]
		wanted, doubt := j.doubts[name]
		switch {
		case got == last:
		case doubt && got.there == wanted.there && got.data == wanted.data && (!last.there || !got.there || got.uid == last.uid && got.version > last.version):
			done++
			j.newest = max(j.newest, got.version)
		default:
			t.Errorf("%s was acknowledged as %s (without a response: %t, as %s), and is %s", name, last.brief(), doubt, wanted.brief(), got.brief())
		}
		j.objects[name] = got
	}
	clear(j.doubts)
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%d objects are as acknowledged, and %d of those deleted are gone; %d of the operations without a response were done", len(have), len(names)-len(have), done)
}

func (o object) brief() string {
	if !o.there {
		return "not there"
	}
	return fmt.Sprintf("uid %s, resourceVersion %d, %d bytes %.8s…", o.uid, o.version, len(o.data), o.data)
}
