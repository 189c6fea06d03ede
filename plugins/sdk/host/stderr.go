package host

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"
)

// What a plugin may write into the log. A flood is read, so that it does not
// stop the plugin, but no faster than costs the device nothing worth speaking of.
const (
	LogRate  = 100     // lines a second, in the long run
	LogBurst = 500     // lines at once
	maxLine  = 8 << 10 // bytes; longer lines are cut

	readRate  = 4 << 20 // bytes a second
	readBurst = 4 << 20

	keptLines = 10 // for errors about a plugin that ended
	dropsTold = 5 * time.Second
)

// stderrLog turns what a plugin writes to stderr into log records and keeps
// the last lines to explain an exit with.
type stderrLog struct {
	log *slog.Logger

	mu      sync.Mutex
	partial []byte
	last    []string
	lines   bucket
	bytes   bucket
	dropped int
	told    time.Time // of the last word about dropped lines
}

func newStderrLog(log *slog.Logger) *stderrLog {
	now := time.Now()
	return &stderrLog{log: log, lines: newBucket(LogRate, LogBurst, now), bytes: newBucket(readRate, readBurst, now)}
}

// bucket is a token bucket that may go into debt.
type bucket struct {
	rate, most, tokens float64
	at                 time.Time
}

func newBucket(rate, most float64, now time.Time) bucket {
	return bucket{rate: rate, most: most, tokens: most, at: now}
}

func (b *bucket) fill(now time.Time) {
	b.tokens = min(b.most, b.tokens+b.rate*now.Sub(b.at).Seconds())
	b.at = now
}

// take gives one token, or none.
func (b *bucket) take(now time.Time) bool {
	b.fill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// owe takes n and says how long to wait until the debt is paid.
func (b *bucket) owe(n int, now time.Time) time.Duration {
	b.fill(now)
	b.tokens -= float64(n)
	if b.tokens >= 0 {
		return 0
	}
	return time.Duration(-b.tokens / b.rate * float64(time.Second))
}

// Write takes any piece of the stream.
func (w *stderrLog) Write(b []byte) (int, error) {
	w.mu.Lock()
	wait := w.bytes.owe(len(b), time.Now())
	n := w.write(b)
	w.mu.Unlock()
	if wait > 0 {
		time.Sleep(min(wait, 100*time.Millisecond))
	}
	return n, nil
}

func (w *stderrLog) write(b []byte) int {
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
	return n
}

func (w *stderrLog) line(s string) {
	if s == "" {
		return
	}
	now := time.Now()
	if !w.lines.take(now) {
		w.dropped++
		// Unparsed: what it died of may be among them.
		w.keep(s)
		return
	}
	if w.dropped > 0 && now.Sub(w.told) >= dropsTold {
		w.log.Warn("plugin writes too much: lines were dropped", "lines", w.dropped, "most_a_second", LogRate)
		w.dropped, w.told = 0, now
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
	w.keep(kept)
}

func (w *stderrLog) keep(s string) {
	if w.last = append(w.last, s); len(w.last) > keptLines {
		w.last = append(w.last[:0], w.last[1:]...)
	}
}

// end tells what was dropped and not told yet.
func (w *stderrLog) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dropped > 0 {
		w.log.Warn("plugin wrote too much: lines were dropped", "lines", w.dropped, "most_a_second", LogRate)
		w.dropped = 0
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
