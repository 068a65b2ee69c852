package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

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
		k := &keeper{parts: []part{kernelSettings{setting: "1"}}, log: slog.New(slog.NewTextHandler(&log, nil))}
		ctx, cancel := context.WithCancel(t.Context())
		go k.run(ctx)
		synctest.Wait()
		if err := k.check(ctx); err != nil {
			t.Errorf("after the start: %v", err)
		}
		if k.last() != "" || log.Len() > 0 {
			t.Errorf("a part that never existed counts as removed: %q, %q", k.last(), log.String())
		}
		for range 3 {
			time.Sleep(7 * time.Second)
			write("0\n")
			time.Sleep(2 * keepFresh)
			if have, _ := os.ReadFile(setting); string(have) == "0\n" {
				if err := k.check(ctx); err == nil || !strings.Contains(err.Error(), "packet forwarding (ip_forward=1): missing, will be restored within seconds") {
					t.Errorf("while it is gone: %v", err)
				}
			}
			time.Sleep(keepInterval)
			if have, _ := os.ReadFile(setting); string(have) != "1" {
				t.Errorf("not restored: %q", have)
			}
			if err := k.check(ctx); err != nil {
				t.Error(err)
			}
		}
		if !strings.Contains(k.last(), "put back what another program had removed: packet forwarding") || !strings.Contains(log.String(), "level=WARN msg=\"another program has removed") {
			t.Errorf("the note is %q, the log %q", k.last(), log.String())
		}
		cancel()
	})
}

// A part that cannot be checked or restored does not affect the others.
func TestKeeperGoesOn(t *testing.T) {
	dir := t.TempDir()
	setting := filepath.Join(dir, "setting")
	var log strings.Builder
	k := &keeper{log: slog.New(slog.NewTextHandler(&log, nil)), parts: []part{
		kernelSettings{filepath.Join(dir, "no", "such"): "1"}, kernelSettings{dir: "1"}, kernelSettings{setting: "1"},
	}}
	k.pass(t.Context(), false)
	if have, err := os.ReadFile(setting); err != nil || string(have) != "1" {
		t.Errorf("%q, %v", have, err)
	}
	if strings.Count(log.String(), "level=ERROR") != 2 {
		t.Errorf("the log is %q", log.String())
	}
	if err := k.check(t.Context()); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}
