package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/belay-edge/belay/agent/internal/watchdog"
)

func untilTold(ctx context.Context) error { <-ctx.Done(); return nil }

// deaf ends, but long after it was told to.
func deaf(context.Context) error { <-time.After(time.Minute); return nil }

func TestGroup(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name  string
		parts map[string]func(context.Context) error
		stop  bool
		want  []string // nil: no error
	}{
		{"told to end", map[string]func(context.Context) error{"a": untilTold, "b": untilTold}, true, nil},
		{"one fails, all end", map[string]func(context.Context) error{"a": untilTold, "b": func(context.Context) error { return broken }}, false, []string{"b: broken"}},
		{"one ends by itself", map[string]func(context.Context) error{"a": untilTold, "b": func(context.Context) error { return nil }}, false, []string{"b: ended without being told"}},
		{"one fails to end well", map[string]func(context.Context) error{"a": func(ctx context.Context) error { <-ctx.Done(); return broken }}, true, []string{"a: broken"}},
		{"stuck ones are named", map[string]func(context.Context) error{
			"a": untilTold,
			"z": deaf,
			"s": deaf,
		}, true, []string{"still running: s, z", "10s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				g := newGroup(ctx)
				for name, part := range c.parts {
					g.start(name, part)
				}
				if c.stop {
					synctest.Wait()
					cancel()
				}
				err := g.wait(10 * time.Second)
				<-time.After(time.Hour) // for the deaf ones to end
				if c.want == nil && err != nil {
					t.Errorf("got %v", err)
				}
				for _, w := range c.want {
					if err == nil || !strings.Contains(err.Error(), w) {
						t.Errorf("error %v does not say %q", err, w)
					}
				}
			})
		})
	}
}

// listenNotify stands for systemd's socket.
func listenNotify(t *testing.T) <-chan string {
	t.Helper()
	path := filepath.Join(shortDir(t), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	got := make(chan string, 16)
	go func() {
		b := make([]byte, 256)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			got <- string(b[:n])
		}
	}()
	return got
}

func TestSystemdIsToldUntilALoopHangs(t *testing.T) {
	got := listenNotify(t)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", "")
	every, err := feedEvery()
	if err != nil || every != 20*time.Millisecond {
		t.Fatalf("every %s, %v", every, err)
	}
	dog := watchdog.New(nil, every)
	pulse, done := dog.Watch("task loop", 2*time.Second)
	defer done()
	hang := make(chan struct{})
	go func() {
		for {
			select {
			case <-pulse:
			case <-hang:
				return
			}
		}
	}()
	ended := make(chan error, 1)
	log := slog.New(slog.DiscardHandler)
	go func() { ended <- dog.Run(t.Context(), func() { notify(log, daemon.SdNotifyWatchdog) }) }()
	for range 2 {
		select {
		case s := <-got:
			if s != daemon.SdNotifyWatchdog {
				t.Fatalf("systemd got %q", s)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("systemd was told nothing")
		}
	}
	close(hang)
	for late := time.After(10 * time.Second); ; {
		select {
		case <-got:
			continue
		case err := <-ended:
			if err == nil || !strings.Contains(err.Error(), "task loop has not turned") {
				t.Errorf("ended with %v", err)
			}
		case <-late:
			t.Error("a hanging loop was not noticed")
		}
		break
	}
}
