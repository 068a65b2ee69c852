package imagestore

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func heldOf(name string, pulled bool, labels ...string) heldImage {
	h := heldImage{name: name, target: digest.FromString(name), labels: map[string]string{}, pulled: pulled}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		h.labels[k] = v
	}
	return h
}

func deploy(service, tag, at string, labels ...string) heldImage {
	h := heldOf(service+":"+tag, false, append(labels, deployedLabel+"="+at, projectLabel+"=shop", serviceLabel+"="+service)...)
	return h
}

// settle applies the rules until nothing changes; that must not take more than one round.
func settle(t *testing.T, all []heldImage, w Wanted) map[string]map[string]string {
	t.Helper()
	apply := func(changes map[string]map[string]string) {
		for _, h := range all {
			maps.Copy(h.labels, changes[h.name])
			maps.DeleteFunc(h.labels, func(_, v string) bool { return v == "" })
		}
	}
	apply(pins(all, w))
	if again := pins(all, w); len(again) > 0 {
		t.Errorf("a second round changes %v", again)
	}
	out := map[string]map[string]string{}
	for _, h := range all {
		out[h.name] = h.labels
	}
	return out
}

func TestPins(t *testing.T) {
	released := func(name string) string { return releasedLabel + "=" + digest.FromString(name).String() }
	all := []heldImage{
		heldOf("shipped:1", false, payloadLabel+"=new", pinnedLabel+"=pinned"),
		heldOf("shipped:0", false, payloadLabel+"=before", pinnedLabel+"=pinned"),
		heldOf("shipped:old", false, payloadLabel+"=old", pinnedLabel+"=pinned"),
		heldOf("archive:1", false, archiveLabel+"=there", archiveCountLabel+"=1"),
		heldOf("archive:gone", false, archiveLabel+"=gone", archiveCountLabel+"=1", pinnedLabel+"=pinned"),
		heldOf("archive:again", false, archiveLabel+"=gone", importedLabel+"=true", pinnedLabel+"=pinned"),
		heldOf("imported:1", false),
		heldOf("imported@"+digest.FromString("x").String(), false),
		heldOf("pulled:1", true),
		heldOf("pulled:mine", true, pinnedLabel+"=pinned"),
		heldOf("mine:1", false, pinnedLabel+"=pinned"),
		heldOf("sha256:0123", false),
		heldOf("released:1", false, released("released:1")),
		heldOf("released:replaced", false, released("another")),
		deploy("api", "1", "2026-01-01T00:00:00Z", pinnedLabel+"=pinned"), deploy("api", "2", "2026-01-02T00:00:00Z", pinnedLabel+"=pinned"),
		deploy("api", "3", "2026-01-03T00:00:00Z"), deploy("api", "4", "2026-01-04T00:00:00Z"),
		deploy("web", "1", "2020-01-01T00:00:00Z"),
	}
	w := Wanted{Payloads: map[string]bool{"new": true, "before": true}, Archives: map[string]bool{"there": true}}
	got := settle(t, all, w)
	var pinned []string
	for name, labels := range got {
		if labels[pinnedLabel] == pinnedValue {
			pinned = append(pinned, name)
		}
	}
	slices.Sort(pinned)
	want := []string{
		"api:2", "api:3", "api:4", "archive:1", "archive:again", "imported:1", "imported@" + digest.FromString("x").String(), "mine:1", "pulled:mine",
		"released:replaced", "shipped:0", "shipped:1", "web:1",
	}
	if !slices.Equal(pinned, want) {
		t.Errorf("pinned are\n%q, want\n%q", pinned, want)
	}
	// Released images stay released, although they are in no registry: the next round must not take them for imports.
	for _, name := range []string{"api:1", "archive:gone", "released:1"} {
		if got[name][releasedLabel] == "" {
			t.Errorf("%s has %v", name, got[name])
		}
	}
	// The image policy still recognizes a shipped one.
	if got["shipped:old"][payloadLabel] != "old" {
		t.Errorf("an old payload's image has %v", got["shipped:old"])
	}
	// A rollback to a released version pins it again.
	for _, h := range all {
		if h.name == "api:1" {
			maps.Copy(h.labels, map[string]string{deployedLabel: "2026-01-05T00:00:00Z", projectLabel: "shop", serviceLabel: "api"})
		}
	}
	got = settle(t, all, w)
	if got["api:1"][pinnedLabel] != pinnedValue || got["api:1"][releasedLabel] != "" || got["api:2"][pinnedLabel] != "" {
		t.Errorf("after a rollback: %v, %v", got["api:1"], got["api:2"])
	}
}

// Names chosen by others do not merge two services.
func TestDeploysOfServicesApart(t *testing.T) {
	var all []heldImage
	for _, s := range [][2]string{{"a", "b/c"}, {"a/b", "c"}, {"a", "b"}, {"", "a/b/c"}} {
		for i := range KeptDeploys {
			h := heldOf(fmt.Sprint(s, i), false, deployedLabel+"="+fmt.Sprint(i))
			h.labels[projectLabel], h.labels[serviceLabel] = s[0], s[1]
			all = append(all, h)
		}
	}
	if kept := keptDeploys(all); len(kept) != len(all) {
		t.Errorf("%d of %d are kept", len(kept), len(all))
	}
}

// A deploy does not know the existing payloads and archives, and releases none.
func TestPinsOfADeploy(t *testing.T) {
	all := []heldImage{heldOf("shipped:old", false, payloadLabel+"=old", pinnedLabel+"=pinned"), heldOf("archive:1", false, archiveLabel+"=x", pinnedLabel+"=pinned")}
	if changes := pins(all, Wanted{}); len(changes) > 0 {
		t.Errorf("it changes %v", changes)
	}
}
