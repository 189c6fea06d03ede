package host

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"sync"
)

const (
	keptLines = 10      // of stderr, for errors about a plugin that ended
	maxLine   = 8 << 10 // longer lines are cut
)

// stderrLog turns what a plugin writes to stderr into log records and keeps
// the last lines to explain an exit with.
type stderrLog struct {
	log *slog.Logger

	mu      sync.Mutex
	partial []byte
	last    []string
}

// Write takes any piece of the stream.
func (w *stderrLog) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(b)
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		piece := b
		if i >= 0 {
			piece = b[:i]
		}
		if room := maxLine - len(w.partial); len(piece) > room {
			piece = piece[:room]
		}
		w.partial = append(w.partial, piece...)
		if i < 0 {
			break
		}
		b = b[i+1:]
		w.line(string(bytes.TrimRight(w.partial, "\r")))
		w.partial = w.partial[:0]
	}
	return n, nil
}

func (w *stderrLog) line(s string) {
	if s == "" {
		return
	}
	level, message, attrs := parseLine(s)
	w.log.LogAttrs(context.Background(), level, message, attrs...)
	kept := message
	if kept == "" {
		kept = s
	}
	for _, a := range attrs {
		if a.Key == "err" || a.Key == "error" {
			kept += ": " + a.Value.String()
		}
	}
	w.last = append(w.last, kept)
	if len(w.last) > keptLines {
		w.last = w.last[1:]
	}
}

// tail is the last lines the plugin wrote.
func (w *stderrLog) tail() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := append([]string(nil), w.last...)
	if len(w.partial) > 0 {
		lines = append(lines, string(w.partial))
	}
	return lines
}

// parseLine understands what slog's JSON handler writes, as serve.Main sets it
// up; any other line is a message by itself.
func parseLine(s string) (slog.Level, string, []slog.Attr) {
	if s[0] != '{' {
		return slog.LevelInfo, s, nil
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(s), &fields); err != nil {
		return slog.LevelInfo, s, nil
	}
	var level slog.Level
	name, hasLevel := fields[slog.LevelKey].(string)
	message, hasMessage := fields[slog.MessageKey].(string)
	if !hasLevel || !hasMessage || level.UnmarshalText([]byte(name)) != nil {
		return slog.LevelInfo, s, nil
	}
	var attrs []slog.Attr
	for k, v := range fields {
		switch k {
		case slog.LevelKey, slog.MessageKey, slog.TimeKey:
		default:
			attrs = append(attrs, slog.Any(k, v))
		}
	}
	return level, message, attrs
}
