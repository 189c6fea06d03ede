package docker

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	defaultOutput = 4096
	mostOutput    = 1 << 20
	// How long output may trail behind an exit: a child that keeps the pipe
	// open would hold the answer back for ever.
	trailing = time.Second
	// A daemon that hangs says nothing about a command: its answers are
	// awaited for so long before and after one, which is less than the agent
	// adds to the command's own time.
	reachTime = 4 * time.Second
	askTime   = 3 * time.Second
)

// Exec implements sdk.Runtime.
func (r *Runtime) Exec(ctx context.Context, q sdk.ExecRequest) (sdk.ExecResult, error) {
	op := "exec in " + q.Attempt.String()
	if len(q.Command) == 0 || q.Command[0] == "" {
		return sdk.ExecResult{}, sdk.Errorf(sdk.Invalid, op, "no command was given")
	}
	id, err := r.makeExec(ctx, op, q)
	if err != nil {
		return sdk.ExecResult{}, r.fail(op, err)
	}
	if q.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, q.Timeout, errTooLong)
		defer cancel()
	}
	res, err := r.exec(ctx, id, q)
	switch {
	case err == nil:
	case errors.Is(err, errSilent):
		return res, r.fail(op, r.silent())
	case context.Cause(ctx) == errTooLong:
		return res, sdk.Errorf(sdk.Deadline, op, "it took longer than %s and was killed", q.Timeout)
	}
	return res, r.fail(op, err)
}

// makeExec prepares the command, which does not run yet.
func (r *Runtime) makeExec(ctx context.Context, op string, q sdk.ExecRequest) (id string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, reachTime, errSilent)
	defer cancel()
	h, err := r.must(ctx, op, q.Attempt)
	if err == nil && h.container.State != sdk.StateRunning {
		return "", sdk.Errorf(sdk.NotFound, op, "it is not running")
	}
	if err == nil {
		id, err = r.engine.execCreate(ctx, h.name, q.Command, q.Env)
	}
	switch {
	case isStatus(err, http.StatusConflict):
		return "", sdk.Errorf(sdk.NotFound, "", "it is not running")
	case err != nil && context.Cause(ctx) == errSilent:
		return "", r.silent()
	}
	return id, err
}

// errSilent is a daemon that does not answer while it should know.
var errSilent = errors.New("the Docker daemon does not answer in time")

func (r *Runtime) silent() error {
	return sdk.Errorf(sdk.Unavailable, "", "%w", errSilent).WithHint(r.daemonHint(errSilent))
}

var errTooLong = sdk.Errorf(sdk.Deadline, "", "the command's own time is over")

func (r *Runtime) exec(ctx context.Context, id string, q sdk.ExecRequest) (sdk.ExecResult, error) {
	limit := q.MaxOutput
	if limit <= 0 {
		limit = defaultOutput
	}
	out := &tailBuffer{limit: min(limit, mostOutput)}
	body, err := r.engine.execStart(ctx, id)
	if err != nil {
		if code, ok := notRunnable(err.Error()); ok {
			return sdk.ExecResult{ExitCode: code, Output: sayNotRunnable(q.Command[0], code)}, nil
		}
		return sdk.ExecResult{}, r.killExec(ctx, id, err)
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		demux(body, out)
	}()
	defer body.Close()
	x, err := r.awaitExec(ctx, id, drained)
	if err != nil {
		return sdk.ExecResult{Output: out.bytes()}, r.killExec(ctx, id, err)
	}
	res := sdk.ExecResult{ExitCode: *x.ExitCode, Output: out.bytes()}
	if code, ok := notRunnable(string(res.Output)); ok && strings.HasPrefix(string(res.Output), "OCI runtime exec failed") {
		res.ExitCode, res.Output = code, sayNotRunnable(q.Command[0], code)
	}
	return res, nil
}

// awaitExec waits for a command's exit and, a moment longer, for its output.
// The daemon tells of an exit only when asked; output that ends tells as well.
func (r *Runtime) awaitExec(ctx context.Context, id string, drained <-chan struct{}) (*execed, error) {
	late := time.Time{}
	for wait := 500 * time.Millisecond; ; {
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		case <-drained:
			t.Stop()
		case <-t.C:
		}
		x, err := r.engine.execInspect(ctx, id)
		if err != nil {
			return nil, err
		}
		over := false
		select {
		case <-drained:
			over = true
		default:
		}
		if !x.Running && x.ExitCode != nil {
			if late.IsZero() {
				late = time.Now()
			}
			if over || time.Since(late) >= trailing {
				return x, nil
			}
		}
		wait = 500 * time.Millisecond
		if over { // its exit is about to be known
			drained, wait = nil, 10*time.Millisecond
			if late.IsZero() {
				late = time.Now().Add(-trailing)
			}
		}
	}
}

// killExec ends a command that failed with this error, and what it started:
// the API has no call for that. Where the daemon does not answer, so that
// nobody knows how far the command has come, it is done in the background, and
// the error is errSilent.
func (r *Runtime) killExec(ctx context.Context, id string, failed error) error {
	ctx = context.WithoutCancel(ctx)
	quick, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	err := r.killed(quick, id)
	if err == nil {
		return failed
	}
	go func() {
		patient, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		if err := r.killed(patient, id); err != nil {
			r.log.Warn("a command that took too long is left in its container", "exec", id, "err", err)
		}
	}()
	if errors.Is(err, errSilent) {
		return err
	}
	return failed
}

// killed kills until the daemon says that the command has ended, or knows it
// no more. The error says why that was not to be had in the context's time.
func (r *Runtime) killed(ctx context.Context, id string) error {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		x, err := r.engine.execInspect(ctx, id)
		var answer *apiError
		switch {
		case err == nil && !x.Running, errors.As(err, &answer):
			return nil
		case err == nil && x.Pid > 1:
			killTree(x.Pid)
		}
		switch stop := pause(ctx, wait); {
		case stop == nil:
		case err != nil:
			return errSilent
		default:
			return errors.New("it does not end")
		}
	}
}

// killTree kills a process and its descendants, which is stopped first so that
// it makes no more of them.
func killTree(pid int) {
	_ = syscall.Kill(pid, syscall.SIGSTOP)
	s := strconv.Itoa(pid)
	children, _ := os.ReadFile("/proc/" + s + "/task/" + s + "/children")
	for _, f := range strings.Fields(string(children)) {
		if child, err := strconv.Atoi(f); err == nil && child > 1 {
			killTree(child)
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// notRunnable reads the exit code of a shell from runc's words.
func notRunnable(msg string) (int, bool) {
	switch {
	case !strings.Contains(msg, "exec failed"):
	case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "no such file or directory"):
		return 127, true
	case strings.Contains(msg, "permission denied"), strings.Contains(msg, "exec format error"), strings.Contains(msg, "is a directory"):
		return 126, true
	}
	return 0, false
}

func sayNotRunnable(command string, code int) []byte {
	if code == 127 {
		return []byte(command + ": not found\n")
	}
	return []byte(command + ": cannot be executed\n")
}

// demux takes the two streams apart again, into one.
func demux(in io.Reader, out io.Writer) {
	b := bufio.NewReaderSize(in, 4<<10)
	var header [8]byte
	for {
		if _, err := io.ReadFull(b, header[:]); err != nil {
			return
		}
		if _, err := io.CopyN(out, b, int64(binary.BigEndian.Uint32(header[4:]))); err != nil {
			return
		}
	}
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
