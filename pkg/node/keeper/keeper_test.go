package keeper

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// file is a setting that is on if the file contains "1".
type file string

func (f file) Missing(context.Context) (string, error) {
	have, err := os.ReadFile(string(f))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if string(have) == "1" {
		return "", nil
	}
	return "the setting", nil
}

func (f file) Restore(context.Context) error { return os.WriteFile(string(f), []byte("1"), 0o600) }

// Parts removed by other programs are restored within 30 seconds, whenever that happens, and logged and reported in status.
func TestKeeperPutsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		setting := filepath.Join(t.TempDir(), "ip_forward")
		write := func(value string) {
			if err := os.WriteFile(setting, []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("0\n")
		var log strings.Builder
		k := New(slog.New(slog.NewTextHandler(&log, nil)))
		k.Add(file(setting))
		ctx, cancel := context.WithCancel(t.Context())
		go k.Run(ctx)
		synctest.Wait()
		if err := k.Check(ctx); err != nil {
			t.Errorf("after the start: %v", err)
		}
		if k.Last() != "" || log.Len() > 0 {
			t.Errorf("a part that never existed counts as removed: %q, %q", k.Last(), log.String())
		}
		for range 3 {
			time.Sleep(7 * time.Second)
			write("0\n")
			time.Sleep(2 * fresh)
			if have, _ := os.ReadFile(setting); string(have) == "0\n" {
				if err := k.Check(ctx); err == nil || !strings.Contains(err.Error(), "the setting: missing, will be restored within seconds") {
					t.Errorf("while it is gone: %v", err)
				}
			}
			time.Sleep(Interval)
			if have, _ := os.ReadFile(setting); string(have) != "1" {
				t.Errorf("not restored: %q", have)
			}
			if err := k.Check(ctx); err != nil {
				t.Error(err)
			}
		}
		if !strings.Contains(k.Last(), "put back what another program had removed: the setting") || !strings.Contains(log.String(), "level=WARN msg=\"another program has removed") {
			t.Errorf("the note is %q, the log %q", k.Last(), log.String())
		}
		cancel()
	})
}

// A part that cannot be checked or restored does not affect the others.
func TestKeeperGoesOn(t *testing.T) {
	dir := t.TempDir()
	setting := filepath.Join(dir, "setting")
	var log strings.Builder
	k := New(slog.New(slog.NewTextHandler(&log, nil)))
	k.Add(file(filepath.Join(dir, "no", "such")), file(dir), file(setting))
	k.pass(t.Context(), false)
	if have, err := os.ReadFile(setting); err != nil || string(have) != "1" {
		t.Errorf("%q, %v", have, err)
	}
	if strings.Count(log.String(), "level=ERROR") != 2 {
		t.Errorf("the log is %q", log.String())
	}
	if err := k.Check(t.Context()); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

// target is a part whose desired value changes.
type target struct {
	want, have string
	broken     error
}

func (p *target) Settle(context.Context) error { return p.broken }

func (p *target) Missing(context.Context) (string, error) {
	if p.have == p.want {
		return "", nil
	}
	return "the value", nil
}

func (p *target) Restore(context.Context) error {
	p.have = p.want
	return p.broken
}

// A change of our own is not another program's removal; a failure is logged once, and explains what is missing.
func TestKeeperSettlesChanges(t *testing.T) {
	var log strings.Builder
	k := New(slog.New(slog.NewTextHandler(&log, nil)))
	setting := filepath.Join(t.TempDir(), "setting")
	p := &target{want: "a", have: "a"}
	k.Add(p, file(setting))
	k.pass(t.Context(), true)
	p.broken = errors.New("no address")
	p.want = "b"
	for range 3 {
		k.pass(t.Context(), false)
	}
	if n := strings.Count(log.String(), "no address"); n != 1 || strings.Contains(log.String(), "another program") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	if err := k.Check(t.Context()); err == nil || err.Error() != "the value: missing: no address" {
		t.Errorf("while it fails: %v", err)
	}
	p.broken, p.have = nil, "b"
	k.pass(t.Context(), false)
	if err := k.Check(t.Context()); err != nil || k.Last() != "" {
		t.Errorf("afterwards: %v, %q", err, k.Last())
	}
}
