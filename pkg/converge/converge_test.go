package converge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"polymesh.dev/polymesh/pkg/ssa"
)

func TestLoop(t *testing.T) {
	rounds := make(chan error)
	answers := make(chan error)
	l := NewLoop(slog.New(slog.DiscardHandler), time.Hour, func(ctx context.Context) error {
		select {
		case err := <-answers:
			rounds <- err
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if l.Ready() == nil {
		t.Error("ready before it was started")
	}
	if err := l.Stop(t.Context()); err != nil {
		t.Errorf("stopped before it was started: %v", err)
	}
	l.Start(t.Context())
	round := func(err error) {
		t.Helper()
		answers <- err
		<-rounds
	}
	bad := errors.New("no API server")
	round(bad) // and again soon, although the interval is an hour
	round(bad)
	round(nil)
	l.Kick()
	l.Kick()
	round(Later("x is missing")) // no round follows before the interval ends, unless it is asked for
	l.Kick()
	round(nil)
	l.Kick()
	answers <- nil // so the round before has ended
	if err := l.Ready(); err != nil {
		t.Errorf("after a good round: %v", err)
	}
	<-rounds
	if err := l.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// A round that hangs is ended, its error is the state, and rounds continue.
func TestRoundTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rounds := 0
		l := NewLoop(slog.New(slog.DiscardHandler), time.Hour, func(ctx context.Context) error {
			if rounds++; rounds > 1 {
				return nil
			}
			<-ctx.Done()
			return fmt.Errorf("list ConfigMaps: %w", ctx.Err())
		})
		l.Start(t.Context())
		time.Sleep(roundTimeout)
		synctest.Wait()
		if err := l.Ready(); rounds != 1 || !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "not applied within 2m0s: list ConfigMaps: ") {
			t.Errorf("after %d rounds: %v", rounds, err)
		}
		time.Sleep(retryFirst)
		synctest.Wait()
		if err := l.Ready(); rounds != 2 || err != nil {
			t.Errorf("after %d rounds: %v", rounds, err)
		}
		if err := l.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Stop ends a round that hangs.
func TestStopDuringRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLoop(slog.New(slog.DiscardHandler), time.Hour, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		l.Start(t.Context())
		synctest.Wait()
		begin := time.Now()
		if err := l.Stop(t.Context()); err != nil || time.Since(begin) != 0 {
			t.Errorf("stopped after %s: %v", time.Since(begin), err)
		}
	})
}

func entry(manager string, operation metav1.ManagedFieldsOperationType) metav1.ManagedFieldsEntry {
	return metav1.ManagedFieldsEntry{Manager: manager, Operation: operation, APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:data":{"f:a":{}}}`)}
}

func TestApplied(t *testing.T) {
	obj := func(value string) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: map[string]any{"kind": "ConfigMap", "data": map[string]any{"a": value, "b": value}}}
		u.SetUID("1")
		u.SetManagedFields([]metav1.ManagedFieldsEntry{entry(ssa.Addon, metav1.ManagedFieldsOperationApply)})
		return u
	}
	var a Applied
	holds := func(u *unstructured.Unstructured) bool {
		t.Helper()
		ok, err := a.Holds("x", u, ssa.Addon)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if holds(obj("1")) {
		t.Error("what was never applied holds")
	}
	if err := a.Note("x", obj("1"), ssa.Addon); err != nil {
		t.Fatal(err)
	}
	mine := obj("1")
	mine.Object["data"].(map[string]any)["b"] = "the user's"
	for what, c := range map[string]struct {
		obj  *unstructured.Unstructured
		want bool
	}{
		"unchanged":                      {obj("1"), true},
		"a field of the user's":          {mine, true},
		"a field of ours":                {obj("2"), false},
		"a field that another has taken": {func() *unstructured.Unstructured { u := obj("1"); u.SetManagedFields(nil); return u }(), false},
		"made again":                     {func() *unstructured.Unstructured { u := obj("1"); u.SetUID("2"); return u }(), false},
	} {
		if got := holds(c.obj); got != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}
