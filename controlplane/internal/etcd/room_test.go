package etcd

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"github.com/belay-edge/belay/controlplane"
)

// Writing with a full disk ended the process, and reading with it.
func TestNearlyFullDiskRefusesWritesOnly(t *testing.T) {
	var log bytes.Buffer
	dir := t.TempDir()
	s, err := openWithin(t.Context(), dir, quotaBytes, 0, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	write := func(key string) error {
		_, _, err := s.Txn(t.Context(), nil, []controlplane.Op{controlplane.Put(key, nil)})
		return err
	}
	if err := write("/a"); err != nil {
		t.Fatal(err)
	}
	s.room.reserve = 1 << 62
	for range 2 {
		err = write("/b")
		if !errors.Is(err, controlplane.Unavailable) || !strings.Contains(err.Error(), "make room") || !strings.Contains(err.Error(), dir) {
			t.Errorf("Txn = %v, want Unavailable with what to do and where", err)
		}
	}
	kvs, _, err := s.List(t.Context(), "/", "", 0)
	if err != nil || len(kvs) != 1 {
		t.Errorf("List = %d keys, %v; want the one written before", len(kvs), err)
	}
	s.room.reserve = 0
	if err := write("/b"); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if n := strings.Count(log.String(), "changes are refused"); n != 1 {
		t.Errorf("the log says it %d times, want once:\n%s", n, log.String())
	}
}

func TestNewStoreOnAFullDisk(t *testing.T) {
	_, err := openWithin(t.Context(), filepath.Join(t.TempDir(), "etcd"), quotaBytes, 1<<62, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("Open = %v, want an error that says what to do", err)
	}
}

func TestLastWords(t *testing.T) {
	noSpace := fmt.Errorf("write /d/db: %w", syscall.ENOSPC)
	for _, r := range []struct {
		name string
		die  func(*zap.Logger)
		want string
	}{
		{"fatal for want of room", func(l *zap.Logger) { l.Fatal("failed to commit tx", zap.Error(noSpace)) }, "make room"},
		{"panic for want of room", func(l *zap.Logger) { l.Panic("failed to open database", zap.Error(noSpace)) }, "make room"},
		{"fatal", func(l *zap.Logger) { l.Fatal("failed", zap.Error(syscall.EIO)) }, "cannot go on"},
		{"panic", func(l *zap.Logger) { l.Panic("a defect") }, "a defect"},
	} {
		t.Run(r.name, func(t *testing.T) {
			var log bytes.Buffer
			words := &lastWords{room: &room{dir: "/d", log: slog.New(slog.NewTextHandler(&log, nil))}, exit: func(code int) { panic(fmt.Sprint("exit ", code)) }}
			func() {
				defer func() { fmt.Fprintln(&log, recover()) }()
				r.die(words.logger())
			}()
			if r.name != "panic" && !strings.Contains(log.String(), "exit 1") || !strings.Contains(log.String(), r.want) {
				t.Errorf("no %q and exit 1 in:\n%s", r.want, log.String())
			}
		})
	}
}
