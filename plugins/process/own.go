package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// ownSupervisor runs belay-supervise as the parent of each program.
type ownSupervisor struct {
	path    string
	cgroups *cgroups
	boot    string
}

func cgroupName(a sdk.Attempt) string {
	return filepath.Join(a.Task, a.Container+"."+strconv.Itoa(a.Number))
}

func (o *ownSupervisor) group(a *attempt) cgroup { return o.cgroups.group(cgroupName(a.Attempt)) }

// fields are what belay-supervise needs of the attempt's cgroup.
func (o *ownSupervisor) fields(a sdk.Attempt) []record.Field {
	var f []record.Field
	g := o.cgroups.group(cgroupName(a))
	for _, j := range g.joins() {
		f = append(f, record.Field{Key: record.Join, Value: j})
	}
	// First out of the plugin's own groups, then where supervisors belong.
	for _, j := range append(serve.OutliveFiles(), o.cgroups.group("supervisors").joins()...) {
		f = append(f, record.Field{Key: record.Scope, Value: j})
	}
	if len(g) > 0 {
		f = append(f, record.Field{Key: record.Kill, Value: g[0].path})
	}
	if oom := g.oomFile(); oom != "" {
		f = append(f, record.Field{Key: record.OOM, Value: oom})
	}
	return f
}

// limit makes the attempt's cgroup.
func (o *ownSupervisor) limit(a sdk.Attempt, l sdk.Limits) error {
	if o.cgroups == nil {
		return cgroup(nil).limit(l)
	}
	g, err := o.cgroups.make(cgroupName(a))
	if err != nil {
		return fmt.Errorf("make the cgroup: %w", err)
	}
	return g.limit(l)
}

func (o *ownSupervisor) launch(_ context.Context, a *attempt) (int, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	// Not os.StartProcess: nobody waits for this child in a thread. The
	// watcher reaps it, and when this process is gone, init does.
	pid, err := syscall.ForkExec(o.path, []string{"belay-supervise", "run", a.dir}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"GOMAXPROCS=1", "GOGC=off"},
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", o.path, err)
	}
	return pid, nil
}

// holder is the belay-supervise process that has the attempt, 0 when none.
func (o *ownSupervisor) holder(a *attempt) int {
	f, err := os.OpenFile(filepath.Join(a.dir, record.LockFile), os.O_RDWR, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	l := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &l); err != nil || l.Type == syscall.F_UNLCK {
		return 0
	}
	return int(l.Pid)
}

// coming says whether a belay-supervise for the attempt exists, on its way to
// the lock perhaps: one that a process of this plugin made just before it was
// killed.
func (o *ownSupervisor) coming(a *attempt) bool {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return false
	}
	for _, e := range all {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		line, err := record.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil && strings.HasSuffix(string(line), "\x00run\x00"+a.dir+"\x00") {
			return true
		}
	}
	return false
}

func (o *ownSupervisor) pending(_ context.Context, a *attempt) (bool, error) {
	return o.holder(a) != 0 || a.staging(), nil
}

func (o *ownSupervisor) settled(_ context.Context, a *attempt) (bool, int, error) {
	pid := o.holder(a)
	return pid == 0, pid, nil
}

func (o *ownSupervisor) watched(a *attempt, program int) int {
	if pid := o.holder(a); pid != 0 {
		return pid
	}
	return program // its supervisor was killed; we can still see it end
}

func (o *ownSupervisor) ended(ctx context.Context, a *attempt) (record.Exit, bool, error) {
	if o.holder(a) != 0 {
		return record.Exit{}, false, nil
	}
	if e, ok := a.exit(); ok {
		return e, true, nil
	}
	_ = o.kill(ctx, a) // what a supervisor would have done
	return record.Exit{Code: -1, Reason: "its supervisor was killed, so nobody saw its exit code"}, true, nil
}

// terminate leaves alone a process that only has the program's number.
func (o *ownSupervisor) terminate(_ context.Context, a *attempt) error {
	s, ok := a.started()
	if !ok {
		return nil
	}
	if p, err := record.ReadProcess(s.PID); err != nil || p.Start != s.Start {
		return nil
	}
	if err := syscall.Kill(s.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send SIGTERM to process %d: %w", s.PID, err)
	}
	return nil
}

// kill reaches the cgroup, or without one every process of the program's
// session. A session's number is not reused while a process is in it; a new
// process with that pid and another start time leads another session.
func (o *ownSupervisor) kill(_ context.Context, a *attempt) error {
	if o.group(a).kill() {
		return nil
	}
	s, ok := a.started()
	if !ok || s.Boot != o.boot {
		return nil
	}
	if p, err := record.ReadProcess(s.PID); err == nil && p.Start != s.Start {
		return nil
	}
	members, err := record.Processes()
	if err != nil {
		return err
	}
	for _, p := range members {
		if p.SID != s.PID {
			continue
		}
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill process %d: %w", p.PID, err)
		}
	}
	return nil
}

func (o *ownSupervisor) joins(a *attempt, _ int) []string { return o.group(a).joins() }

// discard waits for belay-supervise to be gone: it would write the exit of this
// start into the directory of the next.
func (o *ownSupervisor) discard(ctx context.Context, a *attempt) error {
	g := o.group(a)
	for {
		g.kill()
		if o.holder(a) == 0 {
			return g.remove()
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return fmt.Errorf("wait for its supervisor to end: %w", err)
		}
	}
}

func (o *ownSupervisor) prepareTask(_ context.Context, id string, l sdk.Limits) error {
	if o.cgroups == nil {
		return cgroup(nil).limit(l)
	}
	g, err := o.cgroups.make(id)
	if err != nil {
		return fmt.Errorf("make the task's cgroup: %w", err)
	}
	return g.limit(l)
}

func (o *ownSupervisor) removeTask(_ context.Context, id string) error {
	return o.cgroups.group(id).remove()
}
