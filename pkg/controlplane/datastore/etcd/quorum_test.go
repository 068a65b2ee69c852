package etcd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// cluster returns members from a text with a letter each: a voter that answers, A one that does not, l and L learners, m one that has
// not started.
func cluster(text string) (members []Member) {
	for i, c := range text {
		m := Member{ID: uint64(i + 1), Name: fmt.Sprintf("n%d-0123abcd", i+1), URL: fmt.Sprintf("https://192.0.2.%d:2380", i+1)}
		switch c {
		case 'A', 'L':
			m.Problem = "no answer within 2s"
		case 'm':
			m.Name, m.Problem = "", "no answer within 2s"
		}
		m.Learner = c == 'l' || c == 'L'
		members = append(members, m)
	}
	return members
}

// Removing the first member of each cluster.
func TestMayRemove(t *testing.T) {
	for _, c := range []struct{ members, refusal string }{
		{"a", "n1 is the only member of etcd that has the cluster's data"},
		{"al", "the only member"}, // a learner has no complete data
		{"aa", ""},
		{"Aa", "1 of 2 members answers, which is no majority of etcd: no member can be removed until another one is started: n1 (no answer within 2s)"},
		{"aA", "1 of 2 members answers"},
		{"aaa", ""},
		{"Aaa", ""},
		{"aAa", "2 of 3 members answer; removing n1 would leave 2 members of which 1 answers, which is no majority, and the cluster would stop: start these first: n2 (no answer within 2s)"},
		{"ama", "start these first: https://192.0.2.2:2380 (no answer"},
		{"AAa", "1 of 3 members answers, which is no majority of etcd"},
		{"aaaa", ""},
		{"Aaaa", ""},
		{"aAaa", ""},
		{"aAAa", "2 of 4 members answer, which is no majority of etcd"},
		{"AAaaa", ""},
		{"aAaaa", ""},
		{"aAAaa", "3 of 5 members answer; removing n1 would leave 4 members of which 2 answer"},
		{"laA", "--cluster-reset"}, // nothing can be changed
		{"laaA", ""},
		{"Laa", ""},
		{"la", ""},
		{"aal", ""},
		{"aaL", ""},
	} {
		err := MayRemove(cluster(c.members), 1)
		if (err == nil) != (c.refusal == "") || err != nil && !strings.Contains(err.Error(), c.refusal) {
			t.Errorf("%s: %v, want %q", c.members, err, c.refusal)
		}
		var last *LastMemberError
		var quorum *QuorumError
		if err != nil && errors.As(err, &last) == errors.As(err, &quorum) {
			t.Errorf("%s: the error is a %T", c.members, err)
		}
	}
	if err := MayRemove(cluster("aaa"), 9); err == nil {
		t.Error("a member that does not exist may be removed")
	}
}

func TestStalledLearners(t *testing.T) {
	var p learnerProgress
	at := func(seconds int) time.Time { return time.Unix(int64(seconds), 0) }
	for _, step := range []struct {
		seconds int
		match   map[uint64]uint64
		want    string
	}{
		{0, map[uint64]uint64{1: 0, 2: 5}, "[]"},
		{299, map[uint64]uint64{1: 0, 2: 5}, "[]"},
		{300, map[uint64]uint64{1: 0, 2: 6}, "[1]"},
		{301, map[uint64]uint64{1: 1, 2: 6}, "[]"},
		{302, nil, "[]"}, // it does not lead
		{700, map[uint64]uint64{1: 1}, "[]"},
		{1000, map[uint64]uint64{1: 1}, "[1]"},
	} {
		if got := fmt.Sprint(p.stalled(step.match, at(step.seconds), 5*time.Minute)); got != step.want {
			t.Errorf("after %d s: %s, want %s", step.seconds, got, step.want)
		}
	}
}

// The data of a removed member is put aside, five times; other folders stay.
func TestSetAside(t *testing.T) {
	db := t.TempDir()
	dir := filepath.Join(db, "etcd")
	write := func(dir, identity string) {
		t.Helper()
		wal := filepath.Join(dir, "member", "wal")
		if err := os.MkdirAll(wal, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(wal, "0000000000000000-0000000000000000.wal"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, identityName), []byte(identity), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	if aside, err := SetAside(dir, now); aside != "" || err != nil {
		t.Errorf("without data: %q, %v", aside, err)
	}
	write(dir, `{"name":"a-01234567"}`)
	if aside, err := SetAside(dir, now); aside != "" || err != nil {
		t.Errorf("a member of the cluster: %q, %v", aside, err)
	}
	theirs := []string{"etcd-old-backup", "etcd-old-20200101T000000.000Z"}
	for _, name := range theirs {
		if err := os.Mkdir(filepath.Join(db, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 7 {
		write(dir, `{"name":"a-01234567","removed":true}`)
		aside, err := SetAside(dir, now.Add(time.Duration(i)*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if exists, err := Exists(aside); !exists || err != nil {
			t.Errorf("%s: %v, %v", aside, exists, err)
		}
		if exists, err := Exists(dir); exists || err != nil {
			t.Errorf("%s is still there (%v)", dir, err)
		}
	}
	entries, err := os.ReadDir(db)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != asideKept+len(theirs) || entries[1].Name() != "etcd-old-20260101T000002.000Z" {
		t.Errorf("left are %v", entries)
	}
}
