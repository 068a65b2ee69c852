package node

import (
	"os"
	"path/filepath"
	"testing"
)

// Files that can have lost writes are checked, others are not: a check reads every image.
func TestSession(t *testing.T) {
	for name, c := range map[string]struct {
		left  func(t *testing.T, s *Session) // what the previous server has done
		doubt bool
	}{
		"clean end":                       {func(t *testing.T, s *Session) { ok(t, s.End()) }, false},
		"clean end, then a boot":          {func(t *testing.T, s *Session) { ok(t, s.End()); ok(t, os.Remove(s.mark)) }, false},
		"kill -9":                         {func(*testing.T, *Session) {}, false},
		"power failure":                   {func(t *testing.T, s *Session) { ok(t, os.Remove(s.mark)) }, true},
		"power failure, mark of another":  {func(t *testing.T, s *Session) { ok(t, os.WriteFile(s.mark, []byte("x"), 0o600)) }, true},
		"damaged session file":            {func(t *testing.T, s *Session) { ok(t, os.WriteFile(s.file, make([]byte, 60), 0o600)) }, true},
		"version without sessions":        {func(t *testing.T, s *Session) { ok(t, os.Remove(s.file)) }, true},
		"power failure, killed unchecked": {func(t *testing.T, s *Session) { ok(t, os.Remove(s.mark)); ok(t, again(s).Begin(true)) }, true},
		"power failure, ended unchecked": {func(t *testing.T, s *Session) {
			ok(t, os.Remove(s.mark))
			next := again(s)
			ok(t, next.Begin(true))
			ok(t, next.End())
		}, true},
		"power failure, checked": {func(t *testing.T, s *Session) {
			ok(t, os.Remove(s.mark))
			next := again(s)
			ok(t, next.Begin(true))
			ok(t, next.Checked())
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := &Session{file: filepath.Join(dir, "agent", "session.json"), mark: filepath.Join(dir, "run", "session"), dataDir: dir}
			ok(t, s.Begin(false))
			if s.Doubt() {
				t.Error("a first start requests a check")
			}
			c.left(t, s)
			next := again(s)
			ok(t, next.Begin(true))
			if next.Doubt() != c.doubt {
				t.Errorf("doubt is %t, want %t", next.Doubt(), c.doubt)
			}
		})
	}
}

func TestSessionLiesInTheRunDirectory(t *testing.T) {
	cfg := settings(t, "-d", t.TempDir())
	if s := NewSession(cfg.DataDir); filepath.Dir(s.mark) != cfg.DataDir.Run() {
		t.Errorf("the mark is %s, which outlives a boot", s.mark)
	}
}

func again(s *Session) *Session { return &Session{file: s.file, mark: s.mark, dataDir: s.dataDir} }

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
