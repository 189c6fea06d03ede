package containerd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	defaultOutput = 4096
	mostOutput    = 1 << 20
	// How long output may trail behind an exit: a child that keeps the pipe
	// open would hold the answer back for ever.
	trailing = time.Second
	// How long containerd may take to say that the container runs: less than
	// the agent adds to a command's own time.
	reachTime = 4 * time.Second
)

// Exec implements sdk.Runtime.
func (r *Runtime) Exec(ctx context.Context, q sdk.ExecRequest) (sdk.ExecResult, error) {
	op := "exec in " + q.Attempt.String()
	ctx = r.in(ctx)
	if len(q.Command) == 0 || q.Command[0] == "" {
		return sdk.ExecResult{}, sdk.Errorf(sdk.Invalid, op, "no command was given")
	}
	// Until it begins, time is containerd's, and only then the command's.
	begin, cancel := context.WithTimeoutCause(ctx, reachTime, errSilent)
	defer cancel()
	h, err := r.must(begin, op, q.Attempt)
	if err == nil && h.container.State != sdk.StateRunning {
		return sdk.ExecResult{}, sdk.Errorf(sdk.NotFound, op, "it is not running")
	}
	var res sdk.ExecResult
	if err == nil {
		res, err = r.exec(ctx, begin, h, q)
	}
	switch {
	case err == nil, errors.Is(err, errTooLong):
	case context.Cause(begin) == errSilent && ctx.Err() == nil:
		err = sdk.Errorf(sdk.Unavailable, op, "%w", errSilent).WithHint("look at containerd, at " + r.cfg.Address + ", and at how busy the machine is")
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return res, r.fail(op, err)
}

// errSilent is containerd not answering: of the container that tells nothing.
var errSilent = errors.New("containerd does not answer in time")

// errTooLong is the end of a command's own time.
var errTooLong = errors.New("the command took too long")

// exec runs a command that begins before the context begin ends.
func (r *Runtime) exec(ctx, begin context.Context, h *held, q sdk.ExecRequest) (res sdk.ExecResult, err error) {
	c, err := r.client.LoadContainer(begin, h.id)
	if err != nil {
		return res, err
	}
	t, err := c.Task(begin, nil)
	if err != nil {
		return res, err
	}
	spec, err := c.Spec(begin)
	if err != nil {
		return res, err
	}
	proc := *spec.Process
	proc.Args, proc.Terminal = q.Command, false
	proc.Env = append(append([]string{}, proc.Env...), q.Env...)
	limit := q.MaxOutput
	if limit <= 0 {
		limit = defaultOutput
	}
	out := &tailBuffer{limit: min(limit, mostOutput)}
	id := "exec-" + token()
	dir := filepath.Join(r.runDir, "exec")
	p, err := t.Exec(begin, id, &proc, cio.NewCreator(cio.WithStreams(nil, out, out), cio.WithFIFODir(dir)))
	if err != nil {
		return res, err
	}
	defer func() {
		dctx, cancel := after(ctx)
		defer cancel()
		if _, e := p.Delete(dctx, client.WithProcessKill); e != nil && !errdefs.IsNotFound(e) {
			r.log.Warn("a command's remains are left in its container", "container", h.id, "exec", id, "err", e)
		}
	}()
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	exited, err := p.Wait(wctx)
	if err != nil {
		return res, err
	}
	if err := p.Start(begin); err != nil {
		msg := err.Error()
		switch {
		case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "no such file or directory"):
			return sdk.ExecResult{ExitCode: 127, Output: []byte(q.Command[0] + ": not found\n")}, nil
		case strings.Contains(msg, "permission denied"), strings.Contains(msg, "exec format error"), strings.Contains(msg, "is a directory"):
			return sdk.ExecResult{ExitCode: 126, Output: []byte(q.Command[0] + ": cannot be executed\n")}, nil
		}
		return res, err
	}
	if q.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, q.Timeout, errTooLong)
		defer cancel()
	}
	select {
	case s := <-exited:
		code, _, err := s.Result()
		if err != nil {
			return res, err
		}
		drained := make(chan struct{})
		go func() { p.IO().Wait(); close(drained) }()
		select {
		case <-drained:
		case <-time.After(trailing):
			p.IO().Cancel()
			p.IO().Close()
		}
		return sdk.ExecResult{ExitCode: int(code), Output: out.bytes()}, nil
	case <-ctx.Done():
		kctx, kcancel := after(ctx)
		defer kcancel()
		_ = p.Kill(kctx, unix.SIGKILL)
		select {
		case <-exited:
		case <-kctx.Done():
		}
		p.IO().Cancel()
		p.IO().Close()
		res.Output = out.bytes()
		if err = context.Cause(ctx); err == errTooLong {
			err = sdk.Errorf(sdk.Deadline, "", "%w, more than %s, and was killed", errTooLong, q.Timeout)
		}
		return res, err
	}
}

func token() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	limit int

	mu  sync.Mutex
	buf []byte
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if extra := len(t.buf) - t.limit; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(p), nil
}

func (t *tailBuffer) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]byte(nil), t.buf...)
}
