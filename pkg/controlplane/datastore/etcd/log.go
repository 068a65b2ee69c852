package etcd

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zap returns a logger whose warnings and errors go to the server's log. What etcd considers fatal panics, so that a failed start can
// return it.
func (e *Etcd) zap() *zap.Logger { return e.zapAbove(zapcore.WarnLevel) }

// zapErrors is the level for work on a copy, whose warnings are about a cluster that is not there.
const zapErrors = zapcore.ErrorLevel

func (e *Etcd) zapAbove(lowest zapcore.Level) *zap.Logger {
	return zap.New(&core{log: e.log, etcd: e, lowest: lowest}, zap.WithFatalHook(zapcore.WriteThenPanic))
}

// core is a zapcore.Core on slog.
type core struct {
	log  *slog.Logger
	etcd *Etcd
	// lowest is the level from which etcd logs for the user: an idle member writes several entries a minute for information.
	lowest zapcore.Level
	fields []zapcore.Field
}

// removedMessage is how etcd reports that this member was removed (etcdserver/server.go, and rafthttp/util.go for one that was away meanwhile).
const removedMessage = "the member has been permanently removed from the cluster"

// Members of different clusters report it many times a second: the one that sends (rafthttp/util.go and stream.go), and the one that
// rejects the request (rafthttp/http.go).
var foreignMessages = []string{"request sent was ignored due to cluster ID mismatch", "request sent was ignored by remote peer due to cluster ID mismatch"}

const strangerMessage = "request cluster ID mismatch"

// expected are entries about what is not a problem: a learner tries to publish its name in a tight loop until it is promoted (publishV3 in
// etcdserver/server.go), Promote tries again until it may, and data from a snapshot have no term until the first write. A change of the members
// that is not valid any more when it is applied, because two machines join at the same time for example, is also read again at each start;
// the one that requested it gets the reason (applyConfChange, there).
var expected = []string{
	"failed to publish local member to cluster", "rejecting promote learner", "failed to update storage version", "Validation on configuration change failed",
}

// Enabled implements zapcore.Core.
func (c *core) Enabled(l zapcore.Level) bool { return l >= c.lowest }

// With implements zapcore.Core.
func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{c.log, c.etcd, c.lowest, append(append([]zapcore.Field{}, c.fields...), fields...)}
}

// Check implements zapcore.Core.
func (c *core) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

// Write implements zapcore.Core.
func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	encoder := zapcore.NewMapObjectEncoder()
	for _, f := range append(append([]zapcore.Field{}, c.fields...), fields...) {
		f.AddTo(encoder)
	}
	cause, _ := encoder.Fields["error"].(string)
	if strings.Contains(e.Message, removedMessage) || strings.Contains(cause, removedMessage) {
		c.etcd.removed.Store(true)
	}
	// Once is enough.
	if slices.Contains(foreignMessages, e.Message) && c.etcd.foreign.Swap(true) || e.Message == strangerMessage && c.etcd.stranger.Swap(true) {
		return nil
	}
	if slices.ContainsFunc(expected, func(prefix string) bool { return strings.HasPrefix(e.Message, prefix) }) || c.etcd.stopping.Load() {
		return nil
	}
	var args []any
	for name, value := range encoder.Fields {
		args = append(args, name, value)
	}
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, "etcd: "+e.Message, args...)
	return nil
}

// Sync implements zapcore.Core.
func (*core) Sync() error { return nil }
