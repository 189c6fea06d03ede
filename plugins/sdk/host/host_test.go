package host_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// The test binary is also every plugin the tests launch: what it does as one
// depends on the variable the tests add to its environment.
func TestMain(m *testing.M) {
	if mode := os.Getenv("TEST_PLUGIN"); mode != "" {
		pretend(mode)
		return
	}
	os.Exit(m.Run())
}

func pretend(mode string) {
	parent := os.Getppid()
	mem := sdktest.NewMemory()
	p := &sdktest.MemoryPlugin{Name: "good", Memory: mem}
	switch mode {
	case "good":
	case "protocol1":
		servePluginOfVersion1(mem)
		return
	case "devices":
		serve.Main(&devicePlugin{})
		return
	case "exits":
		fmt.Fprintln(os.Stderr, "cannot find the flux capacitor")
		os.Exit(3)
	case "version99":
		fmt.Println("1|99|unix|/nowhere|grpc|")
		hang()
	case "babbles":
		fmt.Println("Hello, world!")
		hang()
	case "mute":
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, syscall.SIGTERM)
		for range ch {
		}
	case "liar":
		fmt.Println("1|1|unix|/nowhere/at/all|grpc|")
		hang()
	case "misconfigured":
		p.OnConfigure = func(sdk.Config) error {
			return sdk.Errorf(sdk.Invalid, "read the configuration", "color: want red or blue").WithHint("see plugins.d/good.toml")
		}
	case "dies-in-configure":
		p.OnConfigure = func(sdk.Config) error { fmt.Fprintln(os.Stderr, "aaargh"); os.Exit(9); return nil }
	case "hangs-in-configure":
		p.OnConfigure = func(sdk.Config) error { hang(); return nil }
	case "prints":
		p.OnConfigure = func(c sdk.Config) error {
			fmt.Println("stray output")
			slog.Warn("structured", "n", 3)
			slog.Debug("config", "json", string(c.JSON), "state", c.StateDir)
			return nil
		}
	case "panics":
		mem.FailWith(func(op string) error {
			if op == "list" || op == "pull" {
				panic("boom")
			}
			return nil
		})
	case "finishes":
		mem.FailWith(func(op string) error {
			if op != "list" {
				return nil
			}
			fmt.Fprintln(os.Stderr, "busy")
			for os.Getppid() == parent { // until the host is dead
				<-time.After(time.Millisecond)
			}
			for range 100 { // each would be the end without a handler for SIGPIPE
				fmt.Fprintln(os.Stderr, "still here")
			}
			return os.WriteFile(os.Getenv("TEST_MARK"), []byte("done"), 0o600)
		})
	case "raw":
		serveRaw()
		return
	case "leaves":
		p.OnConfigure = leave
	case "connects":
		connect()
		return
	case "impostor":
		fmt.Printf("1|2|unix|%s|grpc|\n", os.Getenv("TEST_SOCKET"))
		hang()
	case "gasps":
		mem.FailWith(func(op string) error {
			if op == "list" {
				fmt.Fprintln(os.Stderr, "aaargh")
				os.Exit(7)
			}
			return nil
		})
	case "wordy":
		mem.FailWith(func(op string) error {
			if op == "list" {
				return sdk.Errorf(sdk.Conflict, strings.Repeat("op", 1500), "%s", strings.Repeat("blah ", 1000))
			}
			return nil
		})
	case "hangs":
		mem.FailWith(func(op string) error {
			if op == "list" {
				hang()
			}
			return nil
		})
	}
	serve.Main(p)
}

func options(t *testing.T, mode string) host.Options {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.MkdirTemp("", "belay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	return host.Options{Path: self, Name: "good", SocketDir: base, Env: []string{"TEST_PLUGIN=" + mode},
		Config: sdk.Config{StateDir: base, RunDir: base, JSON: json.RawMessage(`{"a":1}`)}}
}

func launch(t *testing.T, mode string) *host.Plugin {
	t.Helper()
	p, err := host.Launch(t.Context(), options(t, mode))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func runtime(t *testing.T, p *host.Plugin) sdk.Runtime {
	t.Helper()
	r, ok := p.Runtime()
	if !ok {
		t.Fatal("not a runtime")
	}
	return r
}

func TestCallsCrossTheProcessBoundary(t *testing.T) {
	p := launch(t, "good")
	if d := cmp.Diff(sdk.Info{Name: "good", Version: "1.2.3-test", Kinds: []sdk.Kind{sdk.KindRuntime}}, p.Info()); d != "" {
		t.Errorf("Info (-want +got):\n%s", d)
	}
	ctx, r := t.Context(), runtime(t, p)
	if err := p.Ping(ctx); err != nil {
		t.Error(err)
	}
	var seen []sdk.PullProgress
	image, err := r.Pull(ctx, sdk.PullRequest{Image: "a"}, func(g sdk.PullProgress) { seen = append(seen, g) })
	if err != nil || image.Bytes != 100 || len(seen) != 2 {
		t.Errorf("Pull: %+v, %v, progress %v", image, err, seen)
	}
	events := make(chan sdk.Attempt, 10)
	ectx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- r.Events(ectx, func(a sdk.Attempt) { events <- a }) }()

	a := sdk.Attempt{Task: "t", Container: "c", Number: 1}
	port := sdk.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 8080}
	c, err := r.Start(ctx, sdk.StartRequest{Attempt: a, Spec: sdk.ContainerSpec{Digest: "sha256:1", Ports: []sdk.PortMapping{port}}})
	if err != nil || c.State != sdk.StateRunning || c.ExitCode != nil {
		t.Fatalf("Start: %+v, %v", c, err)
	}
	b := sdk.Attempt{Task: "t", Container: "d", Number: 1}
	_, err = r.Start(ctx, sdk.StartRequest{Attempt: b, Spec: sdk.ContainerSpec{Ports: []sdk.PortMapping{port}}})
	if !errors.Is(err, sdk.Conflict) || err.Error() != "start t/d/1: host port 8080 is taken by t/c/1" {
		t.Errorf("Start with a taken port: %v", err)
	}
	c, err = r.Stop(ctx, a, time.Second)
	if err != nil || c.ExitCode == nil || *c.ExitCode != 143 {
		t.Errorf("Stop: %+v, %v", c, err)
	}
	_, err = r.Stop(ctx, b, time.Second)
	if !errors.Is(err, sdk.NotFound) {
		t.Errorf("Stop of an unknown attempt: %v", err)
	}
	inv, err := r.List(ctx)
	if len(inv.Containers) == 1 { // which List alone tells
		if c.RanFor = inv.Containers[0].RanFor; c.RanFor <= 0 {
			t.Errorf("List does not tell how long it ran: %+v", inv)
		}
	}
	if err != nil || cmp.Diff([]sdk.Container{c}, inv.Containers) != "" {
		t.Errorf("List: %+v, %v", inv, err)
	}
	select {
	case e := <-events:
		if e != a {
			t.Errorf("event for %s", e)
		}
	case <-time.After(5 * time.Second):
		t.Error("no event")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) || !errors.Is(err, sdk.Canceled) {
		t.Errorf("Events ended with %v", err)
	}
}

func TestLaunchSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	elfHeader := "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9) + "\x02\x00\xb7\x00\x01\x00\x00\x00" + strings.Repeat("\x00", 40)
	for _, c := range []struct {
		name, mode, path string
		sentinel         error
		kind             sdk.ErrorKind
		words            []string
	}{
		{"missing", "", filepath.Join(dir, "missing"), nil, sdk.NotFound, []string{"no such file"}},
		{"a directory", "", dir, host.ErrNotExecutable, sdk.Invalid, []string{"directory"}},
		{"not executable", "", file("plain", "x", 0o644), host.ErrNotExecutable, sdk.Invalid, []string{"0644", "chmod 755"}},
		{"a text file", "", file("text", "Dear sir\n", 0o755), host.ErrNotPlugin, sdk.Invalid, []string{"text file"}},
		{"an empty file", "", file("empty", "", 0o755), host.ErrNotPlugin, sdk.Invalid, []string{"empty"}},
		{"another architecture", "", file("arm", elfHeader, 0o755), host.ErrNotPlugin, sdk.Invalid, []string{"built for aarch64"}},
		{"a script for nobody", "", file("script", "#!/no/such/interpreter\n", 0o755), host.ErrNotPlugin, sdk.Invalid, []string{"/no/such/interpreter"}},
		{"some other program", "", "/bin/true", host.ErrExited, sdk.Unavailable, []string{"exit status 0"}},
		{"exits at once", "exits", "", host.ErrExited, sdk.Unavailable, []string{"exit status 3", "flux capacitor"}},
		{"another version", "version99", "", host.ErrVersion, sdk.Invalid, []string{"99", "speaks 1 to 2"}},
		{"a program that talks", "babbles", "", host.ErrNotPlugin, sdk.Invalid, []string{"Hello, world!"}},
		{"no handshake", "mute", "", host.ErrTimeout, sdk.Deadline, []string{"500ms"}},
		{"a socket that is not there", "liar", "", nil, sdk.Unavailable, []string{"nowhere"}},
		{"a wrong configuration", "misconfigured", "", nil, sdk.Invalid, []string{"color: want red or blue", "plugins.d/good.toml"}},
		{"dies while configured", "dies-in-configure", "", host.ErrExited, sdk.Unavailable, []string{"exit status 9", "aaargh"}},
		{"hangs while configured", "hangs-in-configure", "", host.ErrTimeout, sdk.Deadline, []string{"configure"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options(t, c.mode)
			if c.path != "" {
				o.Path = c.path
			}
			if c.sentinel == host.ErrTimeout {
				o.StartTimeout = 500 * time.Millisecond
			}
			begun := time.Now()
			p, err := host.Launch(t.Context(), o)
			if err == nil {
				p.Kill()
				t.Fatal("no error")
			}
			if took := time.Since(begun); took > 8*time.Second {
				t.Errorf("it took %s", took)
			}
			if c.sentinel != nil && !errors.Is(err, c.sentinel) || sdk.KindOf(err) != c.kind {
				t.Errorf("error of kind %q, want %q and sentinel %v: %v", sdk.KindOf(err), c.kind, c.sentinel, err)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error lacks %q: %v", w, err)
				}
			}
			noSockets(t, o.SocketDir)
		})
	}
}

// noSockets waits for the directory to hold what it held before.
func noSockets(t *testing.T, dir string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		left, _ := filepath.Glob(filepath.Join(dir, "[^l]*")) // but for the lock
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %v", left)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func TestNameMustBeTheFilesName(t *testing.T) {
	o := options(t, "good")
	o.Name = "better"
	_, err := host.Launch(t.Context(), o)
	if !errors.Is(err, host.ErrName) || !errors.Is(err, sdk.Invalid) || !strings.Contains(err.Error(), `rename the file to "good"`) {
		t.Errorf("got %v", err)
	}
}

func TestSocketDirMustBePrivate(t *testing.T) {
	o := options(t, "good")
	if err := os.Chmod(o.SocketDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Launch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "0755, want 0700") {
		t.Errorf("got %v", err)
	}
	o.SocketDir = filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	if err := os.Mkdir(o.SocketDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Launch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("got %v", err)
	}
}

func TestDeathFailsCallsAtOnce(t *testing.T) {
	o := options(t, "hangs")
	dir := o.SocketDir
	p, err := host.Launch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	r := runtime(t, p)
	failed := make(chan error, 1)
	go func() { _, err := r.List(context.Background()); failed <- err }()
	if err := p.Ping(t.Context()); err != nil { // the call is on its way
		t.Fatal(err)
	}
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		if !errors.Is(err, sdk.Unavailable) {
			t.Errorf("got %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the call did not end")
	}
	select {
	case <-p.Exited():
	case <-time.After(5 * time.Second):
		t.Fatal("the exit was not seen")
	}
	if !strings.Contains(p.ExitReason(), "SIGKILL") {
		t.Errorf("exit reason is %q", p.ExitReason())
	}
	if _, err := r.Info(t.Context()); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("a call after the exit: %v", err)
	}
	p.Close(t.Context())
	noSockets(t, dir)
}

// stopProcess returns once every thread has stopped: until then it answers.
func stopProcess(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		running := len(stats) == 0
		for _, path := range stats {
			if b, err := os.ReadFile(path); err == nil && !strings.Contains(string(b), ") T ") {
				running = true
			}
		}
		switch {
		case !running:
			return
		case time.Now().After(deadline):
			t.Fatalf("process %d does not stop", pid)
		}
		<-time.After(time.Millisecond)
	}
}

func TestHungPluginIsBoundedByTheCaller(t *testing.T) {
	p := launch(t, "good")
	stopProcess(t, p.PID())
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := p.Ping(ctx); !errors.Is(err, sdk.Deadline) {
		t.Errorf("Ping: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	p.Close(ctx)
	if !strings.Contains(p.ExitReason(), "SIGKILL") {
		t.Errorf("exit reason is %q", p.ExitReason())
	}
}

func TestCloseIsGraceful(t *testing.T) {
	p := launch(t, "good")
	r := runtime(t, p)
	ended := make(chan error, 1)
	go func() { ended <- r.Events(context.Background(), func(sdk.Attempt) {}) }()
	if err := p.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.Close(t.Context())
	if !strings.HasPrefix(p.ExitReason(), "exit status 0") {
		t.Errorf("exit reason is %q", p.ExitReason())
	}
	if err := <-ended; !errors.Is(err, sdk.Unavailable) {
		t.Errorf("Events ended with %v", err)
	}
}

func TestPanicIsOneCallsFailure(t *testing.T) {
	o := options(t, "panics")
	var log syncBuffer
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	p, err := host.Launch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	r := runtime(t, p)
	if _, err := r.List(t.Context()); !errors.Is(err, sdk.Internal) || !strings.Contains(err.Error(), "boom") {
		t.Errorf("List: %v", err)
	}
	if _, err := r.Pull(t.Context(), sdk.PullRequest{Image: "a"}, nil); !errors.Is(err, sdk.Internal) {
		t.Errorf("Pull: %v", err)
	}
	if _, err := r.Info(t.Context()); err != nil {
		t.Errorf("a call after the panics: %v", err)
	}
	p.Close(t.Context())
	if !strings.Contains(log.String(), "host_test.go") {
		t.Errorf("the log lacks the stack:\n%s", log.String())
	}
}

func TestOutputIsLogged(t *testing.T) {
	o := options(t, "prints")
	var log syncBuffer
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	p, err := host.Launch(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	p.Close(t.Context())
	for _, want := range []string{"level=INFO msg=\"stray output\" plugin=good", "level=WARN msg=structured plugin=good n=3"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log.String())
		}
	}
	if strings.Contains(log.String(), "msg=config") {
		t.Errorf("debug lines are logged at another level:\n%s", log.String())
	}
}

// An agent launches for years: nothing of a process that is gone may stay.
func TestLaunchesLeakNothing(t *testing.T) {
	count := func() (goroutines, files int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return goruntime.NumGoroutine(), len(fds)
	}
	once := func() {
		p := launch(t, "good")
		p.Close(t.Context())
		p = launch(t, "good")
		p.Kill()
		for _, mode := range []string{"exits", "babbles", "version99"} {
			if _, err := host.Launch(t.Context(), options(t, mode)); err == nil {
				t.Fatalf("%s: no error", mode)
			}
		}
	}
	once()
	goroutines, files := count()
	for range 3 {
		once()
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		g, f := count()
		if g <= goroutines && f <= files {
			return
		}
		if time.Now().After(deadline) {
			buf := make([]byte, 64<<10)
			t.Fatalf("%d goroutines and %d files, were %d and %d\n%s", g, f, goroutines, files, buf[:goruntime.Stack(buf, true)])
		}
		<-time.After(20 * time.Millisecond)
	}
}

func runAs(path, env string, args ...string) (string, error) {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// hang never returns. An empty select would be found out by the Go runtime
// where nothing else can run, as in a build without cgo.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}
