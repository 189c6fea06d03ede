package etcd

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/belay-edge/belay/controlplane"
)

const (
	// reserve is what has to be free on the disk for a write to be taken.
	// etcd ends its process when a write to its log or database fails, and
	// with it would end reading and every tunnel: it must never come to that.
	// The log takes its next segment of 64 MB at once, the database grows by
	// less than what is written.
	reserve = 96 << 20
	// newStore is what the first segments of a new store's log take.
	newStore = 128 << 20
)

// room is the space on an embedded store's disk.
type room struct {
	dir     string
	reserve uint64 // bytes
	log     *slog.Logger
	short   atomic.Bool // writes are refused; for saying so once
}

// forWrite fails when there is not enough for etcd to be safe in a write.
func (r *room) forWrite() error {
	free, known := available(r.dir)
	short := known && free < r.reserve
	if was := r.short.Swap(short); was != short {
		if short {
			r.log.Error("the disk is nearly full: changes are refused until there is room again, reading goes on", "dir", r.dir, "free_mib", free>>20, "needed_mib", r.reserve>>20)
		} else {
			r.log.Info("there is room on the disk again: changes are taken", "dir", r.dir, "free_mib", free>>20)
		}
	}
	if !short {
		return nil
	}
	return controlplane.Errorf(controlplane.Unavailable,
		"the control plane's disk is nearly full: %d MiB are free under %s, and it takes no change with less than %d; make room there and try again; a restart is not needed",
		free>>20, r.dir, r.reserve>>20)
}

// forStart fails when a new store would not fit. One that is there is let
// start whatever is free: it can be read.
func (r *room) forStart() error {
	if _, err := os.Stat(filepath.Join(r.dir, "member")); err == nil {
		return nil
	}
	if free, known := available(r.dir); known && free < r.reserve+newStore {
		return fmt.Errorf("%d MiB are free under %s and a new store needs %d: make room there or choose another --data-dir", free>>20, r.dir, (r.reserve+newStore)>>20)
	}
	return nil
}

// available is what this user may still write under dir; not known where the
// file system sets itself no limit.
func available(dir string) (bytes uint64, known bool) {
	var st syscall.Statfs_t
	if syscall.Statfs(dir, &st) != nil || st.Blocks == 0 {
		return 0, false
	}
	return st.Bavail * uint64(st.Bsize), true
}

// lastWords is called when etcd gives up, which it does by ending the process:
// others on the disk, or a quota, can take what forWrite has seen free.
type lastWords struct {
	room *room
	exit func(code int)
}

func (l *lastWords) logger() *zap.Logger {
	return zap.New(&core{log: l.room.log.With("from", "etcd")}, zap.WithFatalHook(l), zap.WithPanicHook(l))
}

// OnWrite implements zapcore.CheckWriteHook. etcd has logged what failed.
func (l *lastWords) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	full := false
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok {
			full = full || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
		}
	}
	if e.Level == zapcore.PanicLevel && !full {
		panic(e.Message)
	}
	what := "the store cannot go on: see the lines before; nothing acknowledged is lost"
	if full {
		what = "the store cannot go on, its disk is full: make room there and start belay-control again; nothing acknowledged is lost"
	}
	l.room.log.Error(what, "dir", l.room.dir)
	l.exit(1)
}
