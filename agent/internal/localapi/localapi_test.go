package localapi

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

type fixed struct{}

func (fixed) Status() Status {
	return Status{Version: "1", Instance: "i", Link: Link{Connected: true, Transport: "quic", Since: time.Unix(5, 0).UTC()}, Tasks: map[string]int{"RUNNING": 1}}
}

func (fixed) Tasks() ([]Task, error) {
	zero := 0
	return []Task{{ID: "t", LastStatus: "RUNNING", Containers: []Container{{Name: "c", ExitCode: &zero}}}}, nil
}

func (fixed) Plugins() []Plugin { return nil }

// shortDir is a directory whose path leaves room for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "run")
}

func serve(t *testing.T, dir string) (stop func()) {
	t.Helper()
	s, err := Listen(dir, fixed{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func client(t *testing.T, dir string) *Client {
	t.Helper()
	c, err := NewClient(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestClientSeesWhatTheServerHas(t *testing.T) {
	dir := shortDir(t)
	stop := serve(t, dir)
	c := client(t, dir)
	status, err := c.Status(t.Context())
	if diff := cmp.Diff(fixed{}.Status(), status); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	tasks, err := c.Tasks(t.Context())
	want, _ := fixed{}.Tasks()
	if diff := cmp.Diff(want, tasks); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if plugins, err := c.Plugins(t.Context()); err != nil || plugins == nil || len(plugins) != 0 {
		t.Errorf("want an empty list, got %v, %v", plugins, err)
	}
	if err := c.get(t.Context(), "/v2/x", new(Status)); err == nil || !strings.Contains(err.Error(), "does not know GET /v2/x") {
		t.Errorf("unknown path: %v", err)
	}
	for path, want := range map[string]fs.FileMode{dir: 0o700, filepath.Join(dir, SocketName): 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, st, err)
		}
	}
	if _, err := Listen(dir, fixed{}, slog.Default()); err == nil || !strings.Contains(err.Error(), "another agent is running") {
		t.Errorf("a second agent on the same run directory: %v", err)
	}
	stop()
	if _, err := os.Stat(filepath.Join(dir, SocketName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket left behind: %v", err)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stopped agent: %v", err)
	}
}

func TestSocketOfADeadAgentIsReplaced(t *testing.T) {
	dir := shortDir(t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(dir, SocketName))
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // as kill -9 leaves it
	_ = ln.Close()
	if _, err := client(t, dir).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("dead agent: %v", err)
	}
	serve(t, dir)
	if _, err := client(t, dir).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := shortDir(t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, SocketName), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir, fixed{}, slog.Default()); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the way: %v", err)
	}
	long := filepath.Join(dir, strings.Repeat("x", 100))
	if _, err := Listen(long, fixed{}, slog.Default()); err == nil || !strings.Contains(err.Error(), "--run-dir") {
		t.Errorf("too long a path: %v", err)
	}
}

func TestOnlyRootAndTheAgentsUserMayAsk(t *testing.T) {
	for _, c := range []struct {
		name string
		cred *unix.Ucred
		self int
		want bool
	}{
		{"root", &unix.Ucred{Uid: 0}, 1000, true},
		{"same user", &unix.Ucred{Uid: 1000}, 1000, true},
		{"another", &unix.Ucred{Uid: 1001}, 1000, false},
		{"another, of root's agent", &unix.Ucred{Uid: 1001}, 0, false},
		{"unknown", nil, 0, false},
	} {
		if got := allowed(c.cred, c.self); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
