package docker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Output is copied from the daemon's log to the two paths of an attempt. How
// far it is copied is what the files have grown by, so whoever goes on goes on
// exactly there; of FIFOs a small file in the run directory says it. One
// process at a time copies an attempt: it holds a lock on that file.

// target is where one stream goes.
type target struct {
	Path string
	Base int64 // size of the file before the start
}

func (t target) label() string { return strconv.FormatInt(t.Base, 10) + " " + t.Path }

func targetFrom(label string) target {
	size, path, _ := strings.Cut(label, " ")
	n, _ := strconv.ParseInt(size, 10, 64)
	return target{path, n}
}

// job is one attempt's output, kept in its directory as "job".
type job struct {
	Name           string
	Stdout, Stderr target
}

const (
	jobFile   = "job"
	stateFile = "at" // done, then bytes of stdout and stderr copied: 17 bytes
)

var errBusy = errors.New("another process copies this output")

// lostError is output that cannot be written.
type lostError struct{ error }

func (e *lostError) Unwrap() error { return e.error }

// copying is an attempt's output while this process has the lock on it.
type copying struct {
	job
	engine  *engine
	state   *os.File
	patient bool // a full disk is waited for
	out     [2]stream
}

type stream struct {
	f     *os.File // nil: nowhere, what comes is dropped
	fifo  bool
	at    int64  // bytes copied
	seen  int64  // bytes of this reading of the log
	cut   bool   // the last frame ended without a newline
	cutAt string // and was of this time
	buf   []byte
}

// isDone tells whether all of an attempt's output has been copied.
func isDone(dir string) bool {
	b := make([]byte, 1)
	f, err := os.Open(filepath.Join(dir, stateFile))
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.ReadAt(b, 0)
	return err == nil && b[0] == 1
}

// take opens an attempt's output for copying; errBusy when somebody else has it.
func take(e *engine, dir string, patient bool) (*copying, error) {
	b, err := os.ReadFile(filepath.Join(dir, jobFile))
	if err != nil {
		return nil, err
	}
	c := &copying{engine: e, patient: patient}
	if err := json.Unmarshal(b, &c.job); err != nil {
		return nil, err
	}
	if c.state, err = os.OpenFile(filepath.Join(dir, stateFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(c.state.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		c.state.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errBusy
		}
		return nil, err
	}
	saved := make([]byte, 17)
	_, _ = c.state.ReadAt(saved, 0) // a new one is empty
	same := c.Stdout.Path == c.Stderr.Path
	for i, t := range []target{c.Stdout, c.Stderr} {
		s := &c.out[i]
		s.at = int64(binary.BigEndian.Uint64(saved[1+8*i:]))
		f, err := os.OpenFile(t.Path, os.O_RDWR|os.O_APPEND|syscall.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the agent has let go of it
		} else if err != nil {
			c.close()
			return nil, &lostError{err}
		}
		s.f = f
		info, err := f.Stat()
		if err != nil {
			c.close()
			return nil, err
		}
		// What the saved number lacks is in the file, unless somebody cut it.
		if s.fifo = info.Mode()&fs.ModeNamedPipe != 0; info.Mode().IsRegular() && !same {
			s.at = max(s.at, info.Size()-t.Base)
		}
	}
	return c, nil
}

func (c *copying) close() {
	for i := range c.out {
		if c.out[i].f != nil {
			c.out[i].f.Close()
		}
	}
	c.state.Close() // and the lock with it
}

func (c *copying) save(done bool) error {
	b := make([]byte, 17)
	if done {
		b[0] = 1
	}
	for i := range c.out {
		binary.BigEndian.PutUint64(b[1+8*i:], uint64(c.out[i].at))
	}
	_, err := c.state.WriteAt(b, 0)
	return err
}

// read copies what the daemon's log has beyond what has been copied, with
// follow until the container ends.
func (c *copying) read(ctx context.Context, tty, follow bool) error {
	body, err := c.engine.logs(ctx, c.Name, follow, !tty)
	if err != nil {
		return err
	}
	defer body.Close()
	for i := range c.out {
		s := &c.out[i]
		s.seen, s.cut, s.buf = 0, false, s.buf[:0]
	}
	in := bufio.NewReaderSize(body, 16<<10)
	if err := c.frames(ctx, in, tty); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}
	return nil
}

const mostFrame = 1 << 20 // the daemon makes them of 16 KiB

func (c *copying) frames(ctx context.Context, in *bufio.Reader, tty bool) error {
	var header [8]byte
	var frame []byte
	for {
		if in.Buffered() == 0 {
			if err := c.flush(ctx); err != nil {
				return err
			}
		}
		if tty {
			_, err := in.Peek(1)
			if err == nil {
				b, _ := in.Peek(in.Buffered())
				if err := c.put(ctx, &c.out[0], b); err != nil {
					return err
				}
				_, _ = in.Discard(len(b))
				continue
			}
			return c.ended(ctx, err)
		}
		if _, err := io.ReadFull(in, header[:]); err != nil {
			return c.ended(ctx, err)
		}
		n := binary.BigEndian.Uint32(header[4:])
		if header[0] < 1 || header[0] > 2 || n > mostFrame {
			return fmt.Errorf("the daemon's log stream is damaged: header %x", header)
		}
		if cap(frame) < int(n) {
			frame = make([]byte, n)
		}
		frame = frame[:n]
		if _, err := io.ReadFull(in, frame); err != nil {
			return c.ended(ctx, err)
		}
		when, text, ok := bytes.Cut(frame, []byte{' '})
		if !ok {
			return fmt.Errorf("the daemon's log has a line without a time: %.60q", frame)
		}
		s := &c.out[header[0]-1]
		// A line of more than 16 KiB comes in parts of one time. Docker 20.10
		// leaves out the newline behind the last of them (measured): it is
		// known to be missing when something of another time follows.
		if s.cut && s.cutAt != string(when) {
			if err := c.put(ctx, s, []byte{'\n'}); err != nil {
				return err
			}
		}
		if s.cut = len(text) == 0 || text[len(text)-1] != '\n'; s.cut {
			s.cutAt = string(when)
		}
		if err := c.put(ctx, s, text); err != nil {
			return err
		}
	}
}

func (c *copying) ended(ctx context.Context, err error) error {
	if e := c.flush(ctx); e != nil {
		return e
	}
	if err == io.EOF {
		return nil
	}
	return &awayError{err}
}

// put takes bytes of a stream, of which those copied before are left out.
func (c *copying) put(ctx context.Context, s *stream, b []byte) error {
	s.seen += int64(len(b))
	fresh := s.seen - s.at - int64(len(s.buf))
	if fresh <= 0 {
		return nil
	}
	if fresh < int64(len(b)) {
		b = b[int64(len(b))-fresh:]
	}
	s.buf = append(s.buf, b...)
	if len(s.buf) < 32<<10 {
		return nil
	}
	return c.flush(ctx)
}

// flush writes what was taken. A full disk is waited for, when there is time:
// the daemon's log still has it all.
func (c *copying) flush(ctx context.Context) error {
	wrote := false
	for i := range c.out {
		s := &c.out[i]
		for len(s.buf) > 0 {
			n := len(s.buf)
			var err error
			if s.f != nil {
				n, err = s.write(ctx)
			}
			s.at += int64(n)
			s.buf = append(s.buf[:0], s.buf[n:]...)
			wrote = true
			if err == nil {
				continue
			}
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			if !c.patient {
				return &lostError{err}
			}
			if err := pause(ctx, time.Second); err != nil {
				return err
			}
		}
	}
	if wrote {
		return c.save(false)
	}
	return nil
}

// write ends with the context even where a FIFO's reader does not read.
func (s *stream) write(ctx context.Context) (int, error) {
	if !s.fifo {
		return s.f.Write(s.buf)
	}
	_ = s.f.SetWriteDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = s.f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	return s.f.Write(s.buf)
}

// copyAll copies an attempt's output to its end, waiting for the container's
// exit; without follow it must have exited.
func (c *copying) copyAll(ctx context.Context, follow bool) error {
	for try := 0; ; try++ {
		now, err := c.engine.inspect(ctx, c.Name)
		switch {
		case isStatus(err, 404) && !follow:
			return nil
		case err != nil:
			return err
		case !now.started():
			if !follow {
				return nil
			}
			if err := pause(ctx, min(20*time.Millisecond<<min(try, 8), 2*time.Second)); err != nil {
				return err
			}
			continue
		case now.State.Running || now.State.Paused:
			if !follow {
				return errors.New("it runs")
			}
			if err := c.read(ctx, now.Config.Tty, true); err != nil {
				return err
			}
			if err := pause(ctx, 5*time.Millisecond); err != nil {
				return err
			}
			continue
		}
		if err := c.read(ctx, now.Config.Tty, false); err != nil {
			return err
		}
		return c.save(true)
	}
}
