// Package privilege marks questions that others cannot keep out: those on the socket for root. Package server sets the mark; the stores that bound how
// many questions are answered at a time have places of their own for it.
package privilege

import "context"

type key struct{}

// With returns a context with the mark.
func With(ctx context.Context) context.Context { return context.WithValue(ctx, key{}, true) }

// Of reports whether a context has the mark.
func Of(ctx context.Context) bool { return ctx.Value(key{}) != nil }
