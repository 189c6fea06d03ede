package sdktest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
)

// SlowEnv names the environment variable that stretches the suites' patience
// by a whole number, on emulated and very small machines.
const SlowEnv = "BELAY_TEST_SLOW"

// ruleLaunch is the first rule of every suite.
const ruleLaunch = "it starts, under the name of its file"

type benchOptions struct {
	executable string
	config     json.RawMessage
	slow       int
}

// bench is one plugin with its directories, across launches of its process.
type bench struct {
	t    T // of the whole suite
	opts benchOptions
	dirs sdk.Config
	sock string
	mark string // NAME=value in the environment of the plugin and its children

	mu     sync.Mutex
	live   map[killable]bool
	broken map[string]bool // rules that failed
}

// killable is a process of the plugin.
type killable interface{ Kill() }

func slowness(n int) int {
	if n == 0 {
		n, _ = strconv.Atoi(os.Getenv(SlowEnv))
	}
	return max(n, 1)
}

func newBench(t T, o benchOptions) *bench {
	t.Helper()
	o.slow = slowness(o.slow)
	// Not t.TempDir: sockets need short paths.
	base, err := os.MkdirTemp("", "sdktest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	b := &bench{t: t, opts: o, sock: filepath.Join(base, "sock"), mark: "BELAY_TEST_MARK=" + newID(),
		dirs: sdk.Config{StateDir: filepath.Join(base, "state"), RunDir: filepath.Join(base, "run"), JSON: o.config},
		live: map[killable]bool{}, broken: map[string]bool{}}
	for _, d := range []string{b.sock, b.dirs.StateDir, b.dirs.RunDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(b.kill)
	return b
}

// name the plugin must have.
func (b *bench) name() string { return filepath.Base(b.opts.executable) }

func (b *bench) hostOptions() host.Options {
	return host.Options{
		KeepLeftovers: true, // an agent kills them; that they are there is a defect
		Path:          b.opts.executable, Name: b.name(), SocketDir: b.sock, Config: b.dirs, Env: []string{b.mark},
		StartTimeout: b.patience(15 * time.Second),
		Logger:       slog.New(slog.NewTextHandler(logWriter{b.t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// launch starts the plugin's process as an agent does.
func (b *bench) launch(t T) *host.Plugin {
	t.Helper()
	p, err := host.Launch(b.ctx(t), b.hostOptions())
	if err != nil {
		t.Fatalf("expected the plugin to start, but: %v", err)
	}
	b.born(p)
	return p
}

func (b *bench) born(k killable) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.live[k] = true
}

// over forgets a process that has ended.
func (b *bench) over(k killable) {
	k.Kill()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.live, k)
}

// kill ends every process of the plugin.
func (b *bench) kill() {
	b.mu.Lock()
	var all []killable
	for k := range b.live {
		all = append(all, k)
	}
	b.mu.Unlock()
	for _, k := range all {
		b.over(k)
	}
}

// close asks a process to end, as an agent does.
func (b *bench) close(p *host.Plugin) {
	ctx, cancel := context.WithTimeout(context.Background(), b.patience(10*time.Second))
	defer cancel()
	p.Close(ctx)
	b.over(p)
}

// rule names a test and remembers whether it failed.
func (b *bench) rule(name string, test func(T)) rule {
	return rule{name: name, run: func(t T) {
		defer func() {
			if t.Failed() {
				b.mu.Lock()
				b.broken[name] = true
				b.mu.Unlock()
			}
		}()
		test(t)
	}}
}

// missing ends a rule that lacks what another rule is about: it is skipped when
// that one has said so already, so that a defect is told once.
func (b *bench) missing(t T, rule, format string, args ...any) {
	t.Helper()
	if b.told(rule) {
		t.Skipf("not tried: %q failed", rule)
	}
	t.Fatalf(format, args...)
}

// told says whether a rule has failed before.
func (b *bench) told(rule string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.broken[rule]
}

type logWriter struct{ t T }

func (w logWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

func (b *bench) patience(d time.Duration) time.Duration { return d * time.Duration(b.opts.slow) }

func (b *bench) ctx(t T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), b.patience(60*time.Second))
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for check to hold and says what it last complained of.
func (b *bench) eventually(t T, what string, check func() error) {
	t.Helper()
	deadline := time.NewTimer(b.patience(15 * time.Second))
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: %v", what, err)
		case <-t.Context().Done(): // the rule's time is up
			t.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

// marked lists the processes with the bench's mark: the plugin's, and what it
// started.
func (b *bench) marked() []string {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var found []string
	for _, d := range dirs {
		env, err := os.ReadFile(d + "/environ") // empty for a zombie
		if err != nil || !slices.Contains(strings.Split(string(env), "\x00"), b.mark) {
			continue
		}
		line, _ := os.ReadFile(d + "/cmdline")
		found = append(found, fmt.Sprintf("%s (%s)", filepath.Base(d), strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " "))))
	}
	return found
}

func wantKind(t T, what string, err error, kinds ...sdk.ErrorKind) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want one of kind %v", what, kinds)
		return
	}
	if !slices.Contains(kinds, sdk.KindOf(err)) {
		t.Errorf("%s: error is of kind %q, want one of %q: %v", what, sdk.KindOf(err), kinds, err)
	}
}
