package registry

import (
	"errors"
	"fmt"
	"slices"
	"testing"

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
