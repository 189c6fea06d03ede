package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	defaultMaxOutput = 4096
	// outputWait is how long the output of a command is awaited after its end:
	// something it left behind may hold the pipe.
	outputWait = 500 * time.Millisecond
)

// Exec runs a command with the environment, user, directory and cgroup of a
// running attempt.
func (r *Runtime) Exec(ctx context.Context, req sdk.ExecRequest) (sdk.ExecResult, error) {
	op := "exec in " + req.Attempt.String()
	a, o, err := r.find(ctx, op, req.Attempt)
	if err != nil {
		return sdk.ExecResult{}, err
	}
	if o.phase != phaseRunning {
		return sdk.ExecResult{}, sdk.Errorf(sdk.Conflict, op, "it is not running")
	}
	if len(req.Command) == 0 || req.Command[0] == "" {
		return sdk.ExecResult{}, sdk.Errorf(sdk.Invalid, op, "no command")
	}
	fields, err := r.execFields(a, o.pid, req)
	if err != nil {
		return sdk.ExecResult{}, sortOut(op, err)
	}
	if fields == nil {
		return sdk.ExecResult{ExitCode: 127, Output: fmt.Appendf(nil, "%s: not found\n", req.Command[0])}, nil
	}
	var timeout <-chan time.Time
	if req.Timeout > 0 {
		t := time.NewTimer(req.Timeout)
		defer t.Stop()
		timeout = t.C
	}
	return r.execute(ctx, op, fields, req, timeout)
}

func (r *Runtime) execute(ctx context.Context, op string, fields []record.Field, req sdk.ExecRequest, timeout <-chan time.Time) (sdk.ExecResult, error) {
	launch, err := memoryFile(record.EncodeLaunch(fields))
	if err != nil {
		return sdk.ExecResult{}, sortOut(op, err)
	}
	defer launch.Close()
	out := &tail{max: req.MaxOutput}
	if out.max <= 0 {
		out.max = defaultMaxOutput
	}
	cmd := exec.Command(r.stagePath, "exec")
	cmd.Args[0] = "belay-supervise"
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{launch}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = outputWait
	if err := cmd.Start(); err != nil {
		return sdk.ExecResult{}, sortOut(op, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	var why error
	select {
	case err = <-done:
	case <-timeout:
		why = sdk.Errorf(sdk.Deadline, op, "%q took longer than %s", req.Command, req.Timeout)
	case <-ctx.Done():
		why = sortOut(op, ctx.Err())
	}
	// The group is the command's session: what it left behind goes with it.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	if why != nil {
		<-done
		return sdk.ExecResult{Output: out.bytes()}, why
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return sdk.ExecResult{}, sortOut(op, err)
	}
	code := cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		code = 128 + int(ws.Signal())
	}
	return sdk.ExecResult{ExitCode: code, Output: out.bytes()}, nil
}

// execFields is the attempt's launch file with another command; nil when there
// is no such command in the attempt's PATH.
func (r *Runtime) execFields(a *attempt, program int, req sdk.ExecRequest) ([]record.Field, error) {
	saved, err := a.launch()
	if err != nil {
		return nil, err
	}
	sup, err := r.of(a)
	if err != nil {
		return nil, err
	}
	var own []string
	var fields []record.Field
	dir := "/"
	for _, f := range saved {
		switch f.Key {
		case record.Env:
			own = append(own, f.Value)
		case record.Dir, record.UID, record.GID, record.Groups, record.Rlimit, record.NoNewPriv:
			fields = append(fields, f)
			if f.Key == record.Dir {
				dir = f.Value
			}
		}
	}
	env, err := environment("/", append(own, req.Env...))
	if err != nil {
		return nil, sdk.Errorf(sdk.Invalid, "exec", "%w", err)
	}
	path := lookPath(req.Command[0], dir, env)
	if path == "" {
		return nil, nil
	}
	for _, arg := range append([]string{path}, req.Command[1:]...) {
		if strings.ContainsRune(arg, 0) {
			return nil, sdk.Errorf(sdk.Invalid, "exec", "%q holds a NUL byte", arg)
		}
		fields = append(fields, record.Field{Key: record.Arg, Value: arg})
	}
	for _, e := range env {
		fields = append(fields, record.Field{Key: record.Env, Value: e})
	}
	for _, j := range sup.joins(a, program) {
		fields = append(fields, record.Field{Key: record.Join, Value: j})
	}
	return fields, nil
}

// lookPath finds a command as a shell would in that directory with that
// environment; "" when there is none.
func lookPath(name, dir string, env []string) string {
	absolute := func(p string) string {
		if !filepath.IsAbs(p) {
			p = filepath.Join(dir, p)
		}
		return p
	}
	usable := func(p string) bool {
		st, err := os.Stat(p)
		return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
	}
	if strings.Contains(name, "/") {
		return absolute(name) // execve says what is wrong with it
	}
	for _, e := range env {
		if list, ok := strings.CutPrefix(e, "PATH="); ok {
			for _, d := range filepath.SplitList(list) {
				if p := absolute(filepath.Join(d, name)); usable(p) {
					return p
				}
			}
		}
	}
	return ""
}

// memoryFile is an unnamed file in memory: an environment may be secret, and
// larger than a pipe.
func memoryFile(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("belay-exec", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "belay-exec")
	if _, err := f.Write(content); err != nil {
		_ = f.Close()
		return nil, err
	}
	if _, err := f.Seek(0, 0); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// tail keeps the last max bytes written to it.
type tail struct {
	mu  sync.Mutex
	max int
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	p = p[max(0, len(p)-t.max):]
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return n, nil
}

func (t *tail) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]byte(nil), t.buf...)
}
