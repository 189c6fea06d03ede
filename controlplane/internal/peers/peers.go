// Package peers remembers in a file where the QUIC sessions of devices are, so
// that a control plane that was killed can tell them, once it is started again,
// that their sessions are gone.
//
// The file is a log of lines, the last one of an instance counts:
//
//	<instance> <address>:<port>   its session is there
//	<instance> -                  it has none
//
// It is written whole now and then, and only appended to in between. It is a
// help and nothing more: what it says is never needed, lines that make no sense
// are skipped, and a disk that does not take it is complained about once.
package peers

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	maxPeers = 1 << 16 // past it, newcomers are not remembered
	maxFile  = 8 << 20 // read of a file at most
	maxID    = 64      // bytes of an instance's id
	// slack is how many lines the file may have beyond twice its peers.
	slack = 1024
	// interval is the least time between two writes. The first change after
	// it is written at once: a process killed right after is covered.
	interval = 100 * time.Millisecond
)

// Book is the file and what it says. Its methods may be called from several
// goroutines and do not wait for the disk.
type Book struct {
	path string
	log  *slog.Logger
	wake chan struct{} // cap 1

	mu    sync.Mutex
	peers map[string]netip.AddrPort
	left  map[string]netip.AddrPort // of the process before; not back yet
	dirty map[string]struct{}       // changed since the last write

	file  *os.File // Run's own
	lines int      // in file
}

// Open reads what the process before has left. It cannot fail: what is not
// there or not readable is not known.
func Open(path string, log *slog.Logger) *Book {
	b := &Book{
		path: path, log: log, wake: make(chan struct{}, 1),
		peers: map[string]netip.AddrPort{}, left: map[string]netip.AddrPort{}, dirty: map[string]struct{}{},
	}
	f, err := os.Open(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("cannot read where devices were; they take up to a minute to come back", "err", err)
		}
		return b
	}
	defer f.Close()
	b.left = parse(io.LimitReader(f, maxFile))
	return b
}

func parse(r io.Reader) map[string]netip.AddrPort {
	found := map[string]netip.AddrPort{}
	lines := bufio.NewReaderSize(r, 256)
	for {
		line, long, err := lines.ReadLine()
		if err != nil {
			return found
		}
		if long {
			for long && err == nil {
				_, long, err = lines.ReadLine()
			}
			continue
		}
		instance, where, ok := strings.Cut(string(line), " ")
		if !ok || !validID(instance) {
			continue
		}
		if where == "-" {
			delete(found, instance)
			continue
		}
		addr, err := netip.ParseAddrPort(where)
		if err != nil || !usable(addr) || len(found) >= maxPeers {
			continue
		}
		found[instance] = addr
	}
}

func validID(s string) bool {
	return s != "" && len(s) <= maxID && strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// usable keeps a damaged file from making us write to whole networks.
func usable(a netip.AddrPort) bool {
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast() && a.Addr() != broadcast
}

// Left are the sessions of the process before whose instances were not put
// since.
func (b *Book) Left() map[string]netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.left)
}

// Forget drops what Left would return: those have been told, or are gone.
func (b *Book) Forget() {
	b.mu.Lock()
	for instance := range b.left {
		b.dirty[instance] = struct{}{}
	}
	b.left = map[string]netip.AddrPort{}
	b.mu.Unlock()
	b.poke()
}

// Put says where the session of an instance is; the zero address: nowhere that
// matters.
func (b *Book) Put(instance string, addr netip.AddrPort) {
	b.mu.Lock()
	_, waited := b.left[instance]
	was, known := b.peers[instance]
	delete(b.left, instance)
	switch {
	case !validID(instance):
	case !usable(addr), !known && len(b.peers) >= maxPeers:
		delete(b.peers, instance)
		if known || waited {
			b.dirty[instance] = struct{}{}
		}
	case was != addr:
		b.peers[instance] = addr
		b.dirty[instance] = struct{}{}
	}
	changed := len(b.dirty) > 0
	b.mu.Unlock()
	if changed {
		b.poke()
	}
}

func (b *Book) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// Run writes changes to the file until ctx ends, and once more then.
func (b *Book) Run(ctx context.Context) error {
	defer func() {
		if b.file != nil {
			_ = b.file.Close()
		}
	}()
	complained := false
	write := func() {
		err := b.write()
		if err != nil && !complained {
			b.log.Warn("cannot remember where devices are; after a crash they take up to a minute to come back", "err", err)
		}
		complained = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			write()
			return nil
		case <-b.wake:
		}
		write()
		pause := time.NewTimer(interval)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
}

// write brings the file up to date: by the lines that changed, or whole when
// it is not open yet, has grown too long, or could not be written before.
func (b *Book) write() error {
	b.mu.Lock()
	changed := b.dirty
	b.dirty = map[string]struct{}{}
	whole := b.file == nil || b.lines > 2*(len(b.peers)+len(b.left))+slack
	var text bytes.Buffer
	lines := 0
	line := func(instance string) {
		addr, ok := b.peers[instance]
		if !ok {
			addr, ok = b.left[instance]
		}
		switch {
		case ok:
			fmt.Fprintf(&text, "%s %s\n", instance, addr)
		case whole:
			return
		default:
			fmt.Fprintf(&text, "%s -\n", instance)
		}
		lines++
	}
	if whole {
		for instance := range b.left {
			line(instance)
		}
		for instance := range b.peers {
			line(instance)
		}
	} else {
		for instance := range changed {
			line(instance)
		}
	}
	b.mu.Unlock()
	if whole {
		return b.replace(text.Bytes(), lines)
	}
	if len(changed) == 0 {
		return nil
	}
	b.lines += lines
	if _, err := b.file.Write(text.Bytes()); err != nil {
		// Perhaps half a line is there now.
		_ = b.file.Close()
		b.file = nil
		return fmt.Errorf("append to the list of peers: %w", err)
	}
	return nil
}

// replace writes a new file in the place of the old one. Nothing is synced:
// what is to be survived is the end of this process, not of the machine.
func (b *Book) replace(text []byte, lines int) (err error) {
	if b.file != nil {
		_ = b.file.Close()
		b.file = nil
	}
	// One name, always the same: what a killed process left there goes.
	fresh := filepath.Join(filepath.Dir(b.path), "."+filepath.Base(b.path)+".new")
	f, err := os.OpenFile(fresh, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write the list of peers: %w", err)
	}
	if _, err = f.Write(text); err == nil {
		err = os.Rename(fresh, b.path)
	}
	if err != nil {
		_ = f.Close()
		_ = os.Remove(fresh)
		return fmt.Errorf("write the list of peers: %w", err)
	}
	b.file, b.lines = f, lines
	return nil
}
