package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// The node with a repository's copies is a server, is the same for everyone, and changes for few repositories when one comes.
func TestOrder(t *testing.T) {
	names := func(list []*peer) (out []string) {
		for _, o := range list {
			out = append(out, o.name)
		}
		return out
	}
	first := func(repository string, list ...*peer) string {
		order(list, repository)
		mirrored := slices.Clone(list)
		slices.Reverse(mirrored)
		order(mirrored, repository)
		if !slices.Equal(names(list), names(mirrored)) {
			t.Errorf("%s: %q or %q", repository, names(list), names(mirrored))
		}
		return list[0].name
	}
	a, b, c := &peer{name: "a", server: true}, &peer{name: "b", server: true}, &peer{name: "c", server: true}
	agent := &peer{name: "agent"}
	used := map[string]int{}
	moved := 0
	for i := range 300 {
		repository := fmt.Sprint("docker.io/shop/", i)
		before := first(repository, a, b, agent)
		after := first(repository, a, b, c, agent)
		used[after]++
		if before != after {
			moved++
			if after != "c" {
				t.Errorf("%s moves from %s to %s", repository, before, after)
			}
		}
	}
	if used["agent"] > 0 || used["a"] < 50 || used["b"] < 50 || used["c"] < 50 || moved != used["c"] {
		t.Errorf("%v, %d have moved", used, moved)
	}
	if got := first("docker.io/shop/api", agent); got != "agent" {
		t.Errorf("without another server, %s", got)
	}
}

func TestAloneNote(t *testing.T) {
	var a alone
	if a.String() != "" {
		t.Errorf("%q", a.String())
	}
	for i := range 5 {
		a.add(imagestore.Copy{Name: fmt.Sprint("docker.io/shop/", i, ":1")}, "why")
		a.add(imagestore.Copy{Signature: true}, "why")
	}
	want := "on this node only: docker.io/shop/0:1 (why), docker.io/shop/1:1 (why), docker.io/shop/2:1 (why), 2 more"
	if a.String() != want {
		t.Errorf("%q, want %q", a.String(), want)
	}
}

// A node whose copies take long delays no other one's, and several such nodes make the others ask elsewhere.
func TestTurns(t *testing.T) {
	c := newCopies(nil)
	begin := func(node string) (n int, err error) {
		for {
			turn, err := c.turn(node)
			if err != nil || !turn {
				return n, err
			}
			c.receiving[offer{node, fmt.Sprint(n)}] = &arriving{}
			n++
		}
	}
	for i := range maxReceiving / nodeReceiving {
		if n, err := begin(fmt.Sprint("slow", i)); n != nodeReceiving || err != nil {
			t.Errorf("%d of one node: %v", n, err)
		}
	}
	// The node waits for its own ones.
	if turn, err := c.turn("slow0"); turn || err != nil {
		t.Errorf("one more of the same node: %t, %v", turn, err)
	}
	if n, err := begin("other"); n != 0 || !errors.Is(err, errBusy) {
		t.Errorf("%d of another node: %v", n, err)
	}
	c.receiving[offer{"slow1", "0"}].done = true
	if n, err := begin("other"); n != 1 || !errors.Is(err, errBusy) {
		t.Errorf("%d of another node after one was done: %v", n, err)
	}
}

// A node gets one request about an image: another only if the image, the reason for which it is kept or the nodes have changed, if the copy failed
// or is under way, and after a time.
func TestAskedOnce(t *testing.T) {
	const tag = ":0123456789abcdef0123456789abcdef"
	asked := []string{}
	status := map[string]int{} // by image, 200 if it is missing
	node := func(name string) *peer {
		server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
			if h.Method == http.MethodHead {
				asked = append(asked, name+" has "+h.URL.Query().Get("ns")+h.URL.Path)
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Content-Length", "100")
				w.Header().Set("Docker-Content-Digest", h.URL.Path[strings.LastIndex(h.URL.Path, "/")+1:])
				return
			}
			var c imagestore.Copy
			if err := errors.Join(json.NewDecoder(h.Body).Decode(&c), c.Check()); err != nil || h.URL.Path != copiesPath {
				t.Errorf("%s: %v", h.URL.Path, err)
			}
			image := c.Name[len("docker.io/shop/"):strings.LastIndex(c.Name, ":")]
			if c.Signature {
				image += " signature"
			}
			asked = append(asked, name+" "+image)
			w.WriteHeader(max(status[image], http.StatusOK))
		}))
		t.Cleanup(server.Close)
		return &peer{name: name, uid: types.UID(name), server: true, address: server.Listener.Addr().String(), client: server.Client()}
	}
	b, other := node("b"), node("d")
	image := func(name string) imagestore.Copy {
		c := imagestore.NewDeployed("docker.io/shop/"+name+tag, "project", name)
		c.Target = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 100}
		return c
	}
	api, web := image("api"), image("web")
	sign := api
	sign.Name, sign.Signature = "docker.io/shop/api:sha256-"+api.Target.Digest.Encoded()+".sig", true
	sign.Deployed, sign.Project, sign.Service = "", "", ""

	c := newCopies(New(Options{Node: "a", Log: slog.New(slog.DiscardHandler)}))
	now := time.Now()
	others := []*peer{b}
	round := func(what string, want ...string) (note string, pending, failed bool) {
		t.Helper()
		asked = nil
		note, pending, failed = c.copyAll(t.Context(), []imagestore.Copy{api, sign, web}, others, now)
		if !slices.Equal(asked, want) {
			t.Errorf("%s: asked are %q, want %q", what, asked, want)
		}
		return note, pending, failed
	}
	status["web"] = http.StatusAccepted
	if note, pending, failed := round("the first", "b api", "b api signature", "b web"); !pending || failed || !strings.Contains(note, "web"+tag+" (being copied to node b)") || strings.Contains(note, "api") {
		t.Errorf("while one is copied: %q, %t, %t", note, pending, failed)
	}
	status["web"] = http.StatusBadGateway
	if note, pending, failed := round("one is under way", "b web"); pending || !failed || !strings.Contains(note, "web"+tag+" (node b: ") {
		t.Errorf("after one has failed: %q, %t, %t", note, pending, failed)
	}
	status["web"] = http.StatusOK
	if note, pending, failed := round("one has failed", "b web"); note != "" || pending || failed {
		t.Errorf("in the end: %q, %t, %t", note, pending, failed)
	}
	round("nothing has changed")
	web = image("web")
	web.Deployed = now.Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000000000Z")
	round("one was deployed again", "b web")
	web.Target.Digest = digest.FromString("again")
	round("one was built again", "b web")
	now = now.Add(checkInterval)
	status["api signature"] = http.StatusConflict
	round("after a time", "b api", "b api signature", "b web")
	round("the node has another signature of the image")

	others = []*peer{other}
	round("the node is lost", "d api", "d api signature", "d web")
	again := *other
	again.uid = "of another machine"
	others = []*peer{&again}
	round("another machine has the name", "d api", "d api signature", "d web")

	// A server that comes gets the copies of some repositories (order), and nothing is asked about the others.
	others = []*peer{&again, b}
	round("a server comes", "b web")
	round("it was asked")

	// What came from another node is that one's to copy, while it has it.
	web.From = "d"
	round("it came from the other node", "d has docker.io/v2/shop/web/manifests/"+web.Target.Digest.String())
	round("it has it")
}
