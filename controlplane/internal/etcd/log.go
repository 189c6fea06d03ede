package etcd

import (
	"context"
	"log/slog"
	"strings"

	"go.uber.org/zap/zapcore"
)

// core routes what etcd logs, at warning and above, to slog. Below that it
// is chatter: dozens of lines at every start.
type core struct{ log *slog.Logger }

func (c *core) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{log: c.log.With(attrs(fields)...)}
}

func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) || besideThePoint(e.Message) {
		return ce
	}
	return ce.AddCore(e, c)
}

// besideThePoint tells warnings that do not apply to a member that listens on
// nothing and has no users.
func besideThePoint(message string) bool {
	return strings.HasPrefix(message, "Running http and grpc server on single port") ||
		strings.HasPrefix(message, "simple token is not cryptographically signed") ||
		// At a stop soon after the start.
		strings.HasPrefix(message, "failed to update cluster version") ||
		// At the very first start, before there is anything to detect; etcd
		// tries again by itself.
		strings.HasPrefix(message, "Failed to detect schema version") ||
		strings.HasPrefix(message, "failed to update storage version")
}

func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, e.Message, attrs(fields)...)
	return nil
}

func (c *core) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	args := make([]any, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		args = append(args, slog.Any(k, v))
	}
	return args
}
