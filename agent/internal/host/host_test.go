package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

var _ agent.Runtimes = (*Host)(nil)

// The test binary is also every plugin: tests link to it by the name of the
// behaviour they want.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "plugin-stage" {
		os.Exit(Stage(os.Args[2:]))
	}
	if os.Getenv("BELAY_PLUGIN") != "" {
		pretend(filepath.Base(os.Args[0]))
	}
	os.Exit(m.Run())
}

func pretend(name string) {
	if name == "garbage" {
		garbage()
	}
	if strings.HasPrefix(name, "dev") {
		serve.Main(&detector{name: name})
	}
	p := &sdktest.MemoryPlugin{Name: name, Memory: sdktest.NewMemory()}
	switch {
	case strings.HasPrefix(name, "good"): // "good-bystander" too
		p.OnConfigure = func(c sdk.Config) error {
			for _, d := range []string{c.StateDir, c.RunDir} {
				if st, err := os.Stat(d); err != nil || st.Mode().Perm() != 0o700 {
					return sdk.Errorf(sdk.Invalid, "configure", "directory %s: %v", d, err)
				}
			}
			return os.WriteFile(filepath.Join(c.StateDir, "config"), c.JSON, 0o600)
		}
	case strings.HasPrefix(name, "slow"):
		p.Memory.FailWith(func(string) error { time.Sleep(300 * time.Millisecond); return nil })
	case name == "daemonless":
		p.OnConfigure = func(c sdk.Config) error {
			p.Memory.FailWith(func(string) error {
				if _, err := os.Stat(filepath.Join(c.StateDir, "daemon")); err != nil {
					return sdk.Errorf(sdk.Unavailable, "ask the daemon", "nobody listens")
				}
				return nil
			})
			return nil
		}
	case name == "picky":
		p.OnConfigure = func(c sdk.Config) error {
			if strings.Contains(string(c.JSON), "bad") {
				return sdk.Errorf(sdk.Invalid, "configure", "color: bad is no color")
			}
			return nil
		}
	case strings.HasSuffix(name, "hog"):
		p.OnConfigure = func(sdk.Config) error { go hog(); return nil }
	case name == "floods":
		p.OnConfigure = func(sdk.Config) error { go flood(); return nil }
	case name == "misnamed":
		p.Name = "somebody-else"
	case name == "misconfigured":
		p.OnConfigure = func(c sdk.Config) error { return sdk.Errorf(sdk.Invalid, "configure", "%s is wrong", c.JSON) }
	case name == "exits":
		fmt.Fprintln(os.Stderr, "no reason")
		os.Exit(3)
	case name == "crashes":
		p.OnConfigure = func(sdk.Config) error {
			time.AfterFunc(20*time.Millisecond, func() { os.Exit(4) })
			return nil
		}
	case name == "heals":
		p.OnConfigure = func(c sdk.Config) error {
			if _, err := os.Stat(filepath.Join(c.StateDir, "well")); err != nil {
				time.AfterFunc(10*time.Millisecond, func() { os.Exit(6) })
			}
			return nil
		}
	case name == "version99":
		fmt.Println("1|99|unix|/nowhere|grpc|")
		hang()
	case name == "hangs":
		hang()
	case name == "stops":
		p.OnConfigure = func(sdk.Config) error {
			time.AfterFunc(50*time.Millisecond, func() { _ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) })
			return nil
		}
	}
	serve.Main(p)
}

type fixture struct {
	*Host
	dir, state, run string
	settings        *settings
}

// settings of plugins, as a test likes them at the moment.
type settings struct {
	mu  sync.Mutex
	of  map[string]Settings
	err map[string]error
}

func (s *settings) read(name string) (Settings, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.of[name], s.err[name]
}

func (s *settings) set(name string, to Settings, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[name], s.err[name] = to, err
}

// newFixture makes a host for plugins that are links to this binary.
func newFixture(t *testing.T, timing Timing, config map[string]json.RawMessage, names ...string) fixture {
	t.Helper()
	base, err := os.MkdirTemp("", "belay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	f := fixture{dir: filepath.Join(base, "p"), state: filepath.Join(base, "s"), run: filepath.Join(base, "r"),
		settings: &settings{of: map[string]Settings{}, err: map[string]error{}}}
	for name, json := range config {
		f.settings.set(name, Settings{Source: name + ".toml", JSON: json}, nil)
	}
	if err := os.Mkdir(f.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		f.link(t, n)
	}
	f.Host, err = New(Config{Dir: f.dir, StateDir: f.state, RunDir: f.run, Settings: f.settings.read, Timing: timing,
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f fixture) link(t *testing.T, name string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(f.dir, name)); err != nil {
		t.Fatal(err)
	}
}

func (f fixture) write(t *testing.T, name, content string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// start runs the host until the test ends.
func (f fixture) start(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience()):
			t.Error("Run did not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

// wait waits until the status of a plugin pleases ok.
func (f fixture) wait(t *testing.T, name string, ok func(Status) bool) Status {
	t.Helper()
	deadline := time.After(patience())
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var last Status
		for _, s := range f.Status() {
			if s.Name == name {
				if ok(s) {
					return s
				}
				last = s
			}
		}
		select {
		case <-deadline:
			t.Fatalf("plugin %s stays %+v", name, last)
		case <-tick.C:
		}
	}
}

// patience is how long anything that should happen may take: longer where the
// machine is an emulated one.
func patience() time.Duration { return slow(20 * time.Second) }

func slow(d time.Duration) time.Duration {
	n, _ := strconv.Atoi(os.Getenv(sdktest.SlowEnv))
	return d * time.Duration(max(n, 1))
}

func is(state State) func(Status) bool { return func(s Status) bool { return s.State == state } }

func TestGoodPluginIsReady(t *testing.T) {
	f := newFixture(t, Timing{}, map[string]json.RawMessage{"good": json.RawMessage(`{"x":1}`)}, "good")
	if d := cmp.Diff([]string{"good"}, f.RuntimeNames()); d != "" {
		t.Error(d)
	}
	if _, err := f.Runtime("good"); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("before Run: %v", err)
	}
	if _, err := f.Runtime("other"); !errors.Is(err, sdk.NotFound) {
		t.Errorf("unknown plugin: %v", err)
	}
	stop := f.start(t)
	got := f.wait(t, "good", is(Ready))
	want := Status{Name: "good", Path: filepath.Join(f.dir, "good"), Version: "1.2.3-test", Kinds: []sdk.Kind{sdk.KindRuntime}, Protocol: sdk.ProtocolVersion,
		State: Ready, RuntimeVersion: "memory", Images: true, Networks: []string{"bridge", "host", "none"}, PID: got.PID, Memory: got.Memory, SHA256: got.SHA256}
	if d := cmp.Diff(want, got); d != "" || got.PID == 0 || len(got.SHA256) != 64 {
		t.Errorf("status, pid %d, checksum %q (-want +got):\n%s", got.PID, got.SHA256, d)
	}
	select {
	case name := <-f.Changes():
		if name != "good" {
			t.Errorf("change of %q", name)
		}
	default:
		t.Error("no change was announced")
	}
	if b, _ := os.ReadFile(filepath.Join(f.state, "good", "config")); string(b) != `{"x":1}` {
		t.Errorf("configuration is %q", b)
	}
	r, err := f.Runtime("good")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.List(t.Context()); err != nil {
		t.Error(err)
	}
	stop()
	if err := syscall.Kill(got.PID, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process lives after Run: %v", err)
	}
	if _, err := r.List(t.Context()); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("after Run: %v", err)
	}
}

// A runtime whose daemon is away is up all the same, and its status says what
// is missing: from the beginning, and each time the agent has noticed.
func TestAwayDaemonIsShown(t *testing.T) {
	f := newFixture(t, Timing{Ping: 20 * time.Millisecond}, nil, "daemonless")
	f.start(t)
	away := func(s Status) bool { return s.State == Ready && strings.Contains(s.Error, "nobody listens") }
	sound := func(s Status) bool { return s.State == Ready && s.Error == "" && s.RuntimeVersion != "" }
	f.wait(t, "daemonless", away)
	daemon := filepath.Join(f.state, "daemonless", "daemon")
	if err := os.WriteFile(daemon, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.wait(t, "daemonless", sound)
	if err := os.Remove(daemon); err != nil {
		t.Fatal(err)
	}
	r, err := f.Runtime("daemonless")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Info(t.Context()); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("Info: %v", err)
	}
	if s := f.wait(t, "daemonless", away); s.Restarts != 0 || s.RuntimeVersion == "" {
		t.Errorf("%+v", s)
	}
}

func TestRelaunchIsTransparent(t *testing.T) {
	f := newFixture(t, Timing{}, nil, "good")
	f.start(t)
	first := f.wait(t, "good", is(Ready))
	r, err := f.Runtime("good")
	if err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := f.wait(t, "good", func(s Status) bool { return s.State == Ready && s.PID != first.PID })
	t.Logf("up again after %s", time.Since(killed))
	if second.Restarts != 1 {
		t.Errorf("restarts is %d", second.Restarts)
	}
	if _, err := r.List(t.Context()); err != nil {
		t.Errorf("the runtime of before the crash: %v", err)
	}
}

func TestBadPluginsAreNamedAndHarmless(t *testing.T) {
	start := slow(1500 * time.Millisecond)
	f := newFixture(t, Timing{Start: start, Quarantine: time.Hour, MinBackoff: time.Millisecond},
		map[string]json.RawMessage{"misconfigured": json.RawMessage(`"this"`)},
		"good", "misnamed", "misconfigured", "exits", "crashes", "version99", "hangs")
	f.write(t, "text", "just words\n", 0o755)
	f.write(t, "plain", "just words\n", 0o644)
	f.write(t, "writable", "#!/bin/sh\n", 0o777)
	f.write(t, "Read.Me", "words\n", 0o644)
	f.write(t, ".hidden", "words\n", 0o644)
	var err error
	if f.Host, err = New(f.config); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	good := f.wait(t, "good", is(Ready))
	for _, c := range []struct {
		name  string
		state State
		words []string
	}{
		{"text", Failed, []string{"text file"}},
		{"plain", Failed, []string{"not executable", "0644"}},
		{"writable", Failed, []string{"0777", "chmod go-w"}},
		{"Read.Me", Failed, []string{"a-z, 0-9 and -"}},
		{"misnamed", Failed, []string{"misnamed", "somebody-else", "rename"}},
		{"misconfigured", Failed, []string{`"this" is wrong`}},
		{"version99", Failed, []string{"99", "speaks 1"}},
		{"exits", Quarantined, []string{"exit status 3", "no reason"}},
		{"crashes", Quarantined, []string{"exit status 4"}},
		{"hangs", Quarantined, []string{"no handshake within " + start.String()}},
	} {
		s := f.wait(t, c.name, func(s Status) bool { return s.State == c.state && s.Error != "" })
		for _, w := range c.words {
			if !strings.Contains(s.Error, w) {
				t.Errorf("%s: error lacks %q: %s", c.name, w, s.Error)
			}
		}
		if c.state == Quarantined && s.Restarts != 4 {
			t.Errorf("%s: quarantined after %d restarts, want 4", c.name, s.Restarts)
		}
		if _, err := f.Runtime(c.name); !errors.Is(err, sdk.Unavailable) {
			t.Errorf("%s: Runtime: %v", c.name, err)
		}
	}
	if d := cmp.Diff([]string{"crashes", "exits", "good", "hangs"}, f.RuntimeNames()); d != "" {
		t.Errorf("runtimes (-want +got):\n%s", d)
	}
	if s := f.wait(t, "good", is(Ready)); s.PID != good.PID || s.Restarts != 0 {
		t.Errorf("the good plugin was disturbed: %+v", s)
	}
}

func TestHungPluginIsRelaunched(t *testing.T) {
	f := newFixture(t, Timing{Ping: 50 * time.Millisecond, PingAnswer: slow(100 * time.Millisecond), Close: 200 * time.Millisecond}, nil, "stops")
	f.start(t)
	s := f.wait(t, "stops", func(s Status) bool { return s.Restarts > 0 && s.State == Ready })
	// It may stop before it has said what it can do.
	if s.Error != "" && !strings.HasPrefix(s.Error, "info (plugin stops)") {
		t.Errorf("error of a plugin that is ready: %s", s.Error)
	}
	f.wait(t, "stops", func(s Status) bool { return strings.Contains(s.Error, "hangs") })
}

func TestReplacedPluginIsTriedAtOnce(t *testing.T) {
	f := newFixture(t, Timing{Scan: 20 * time.Millisecond, Quarantine: time.Hour}, nil)
	f.write(t, "good", "words\n", 0o755)
	f.start(t)
	f.wait(t, "good", func(s Status) bool { return s.State == Failed && s.Error != "" })
	if err := os.Remove(filepath.Join(f.dir, "good")); err != nil {
		t.Fatal(err)
	}
	f.link(t, "good")
	f.wait(t, "good", is(Ready))
	f.link(t, "good2")
	f.wait(t, "good2", is(Ready))
	pid := f.wait(t, "good2", is(Ready)).PID
	if err := os.Remove(filepath.Join(f.dir, "good2")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for len(f.Status()) > 1 {
		select {
		case <-deadline:
			t.Fatalf("a removed plugin is still there: %+v", f.Status())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestJudge(t *testing.T) {
	h := &Host{config: Config{}}
	h.config.Timing.fill()
	crash := errors.New("it crashed")
	start := time.Unix(0, 0)
	type step struct {
		at    time.Duration // of the crash
		up    time.Duration // before it
		err   error
		state State
		least time.Duration
		most  time.Duration
	}
	for name, steps := range map[string][]step{
		"five in ten minutes": {
			{0, 0, crash, Failed, 0, 0},
			{1 * time.Second, 0, crash, Failed, 50 * time.Millisecond, 100 * time.Millisecond},
			{2 * time.Second, 0, crash, Failed, 100 * time.Millisecond, 200 * time.Millisecond},
			{3 * time.Second, 0, crash, Failed, 200 * time.Millisecond, 400 * time.Millisecond},
			{4 * time.Second, 0, crash, Quarantined, 5 * time.Minute, 5 * time.Minute},
			{20 * time.Minute, time.Minute, crash, Quarantined, 5 * time.Minute, 5 * time.Minute},
			{60 * time.Minute, 11 * time.Minute, crash, Failed, 0, 0},
		},
		"now and then": {
			{0, 0, crash, Failed, 0, 0},
			{11 * time.Minute, 9 * time.Minute, crash, Failed, 0, 0},
			{22 * time.Minute, 9 * time.Minute, crash, Failed, 0, 0},
		},
		"for good": {
			{0, 0, sdk.Errorf(sdk.Invalid, "", "no"), Failed, 5 * time.Minute, 5 * time.Minute},
			{5 * time.Minute, 0, sdk.Errorf(sdk.Invalid, "", "no"), Failed, 5 * time.Minute, 5 * time.Minute},
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlugin(h, "p", "/p")
			for i, s := range steps {
				delay, state := p.judge(s.err, s.up, start.Add(s.at))
				if state != s.state || delay < s.least || delay > s.most {
					t.Errorf("step %d: %s and %s, want %s and %s to %s", i, state, delay, s.state, s.least, s.most)
				}
			}
		})
	}
	for crashes := 2; crashes < 100; crashes++ {
		if d := backoff(crashes, h.config.Timing); d <= 0 || d > 30*time.Second {
			t.Errorf("backoff(%d) = %s", crashes, d)
		}
	}
}

func TestTrust(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make files of others")
	}
	dir := t.TempDir()
	file := func(name string, uid, gid int, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o700), os.Chown(path, uid, gid), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file("target", 1234, 0, 0o755), link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, word string }{
		{file("fine", 0, 0, 0o755), ""},
		{file("own-group", 0, 0, 0o775), ""},
		{file("strange", 1234, 0, 0o755), "belongs to user 1234"},
		{file("group", 0, 1234, 0o775), "0775"},
		{file("world", 0, 0, 0o757), "0757"},
		{link, "belongs to user 1234"},
	} {
		err := checkTrust(c.path)
		if c.word == "" && err != nil || c.word != "" && (err == nil || !strings.Contains(err.Error(), c.word)) {
			t.Errorf("%s: %v, want %q", c.path, err, c.word)
		}
	}
}

func TestSettledAfterEveryPluginWasUpOrFailedOnce(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	plugins := filepath.Join(dir, "p")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(plugins, "text"), []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	h, err := New(Config{Dir: plugins, StateDir: filepath.Join(dir, "s"), RunDir: filepath.Join(dir, "r")})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.Settled():
		t.Fatal("settled before anything was launched")
	default:
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	defer func() { cancel(); <-done }()
	select {
	case <-h.Settled():
	case <-time.After(10 * time.Second):
		t.Fatal("never settled")
	}
	if s := h.Status(); len(s) != 1 || s[0].State != Failed {
		t.Errorf("settled with %+v", s)
	}
}

// hang never returns. An empty select would be found out by the Go runtime
// where nothing else can run, as in a build without cgo.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}
