package process_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

// rig is one plugin in this process, and the directory its records are in.
type rig struct {
	*testing.T
	sdk.Runtime
	state, mode string
	task        string
}

// bothModes runs a test with each supervisor that this machine has.
func bothModes(t *testing.T, test func(*rig)) {
	modes := []string{process.ModeOwn}
	if _, err := os.Stat("/run/systemd/system"); err == nil && os.Geteuid() == 0 {
		modes = append(modes, process.ModeSystemd)
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { test(newRig(t, mode)) })
	}
}

func newRig(t *testing.T, mode string) *rig {
	r := &rig{T: t, state: t.TempDir(), mode: mode, task: fmt.Sprintf("%032x", time.Now().UnixNano())}
	r.relaunch()
	t.Cleanup(r.cleanUp)
	return r
}

// relaunch is what a new plugin process sees.
func (r *rig) relaunch() {
	r.Helper()
	p := process.New("test")
	config, _ := json.Marshal(map[string]string{
		"supervisor": filepath.Join(built, "bin", "belay-supervise"), "supervisor_mode": r.mode, "cgroup_parent": cgroupParent()})
	if err := p.Configure(r.Context(), sdk.Config{StateDir: r.state, RunDir: r.state, JSON: config}); err != nil {
		r.Fatal(err)
	}
	r.Runtime = p.Runtime()
}

func (r *rig) cleanUp() {
	inv, err := r.List(context.Background())
	if err != nil {
		r.Error(err)
	}
	tasks := map[string]bool{r.task: true}
	for _, c := range inv.Containers {
		tasks[c.Attempt.Task] = true
		if c.State == sdk.StateRunning {
			if _, err := r.Stop(context.Background(), c.Attempt, 0); err != nil {
				r.Error(err)
			}
		}
		if err := r.Remove(context.Background(), c.Attempt); err != nil {
			r.Error(err)
		}
	}
	for task := range tasks {
		if err := r.RemoveTask(context.Background(), task); err != nil {
			r.Error(err)
		}
	}
}

func (r *rig) request(name, script string) sdk.StartRequest {
	r.Helper()
	dir := r.TempDir()
	req := sdk.StartRequest{
		Attempt: sdk.Attempt{Task: r.task, Container: name, Number: 1}, Network: sdk.NetworkHost,
		Spec:   sdk.ContainerSpec{Command: []string{"/bin/sh", "-c", script}},
		Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err"),
	}
	for _, p := range []string{req.Stdout, req.Stderr} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			r.Fatal(err)
		}
	}
	return req
}

func (r *rig) start(req sdk.StartRequest) sdk.Container {
	r.Helper()
	c, err := r.Start(r.Context(), req)
	if err != nil {
		r.Fatal(err)
	}
	return c
}

func (r *rig) find(a sdk.Attempt) sdk.Container {
	r.Helper()
	inv, err := r.List(r.Context())
	if err != nil {
		r.Fatal(err)
	}
	i := slices.IndexFunc(inv.Containers, func(c sdk.Container) bool { return c.Attempt == a })
	if i < 0 {
		r.Fatalf("List does not have %s", a)
	}
	return inv.Containers[i]
}

// slow stretches what these tests wait for, on emulated machines.
func slow(d time.Duration) time.Duration {
	n, _ := strconv.Atoi(os.Getenv(sdktest.SlowEnv))
	return d * time.Duration(max(n, 1))
}

// eventually waits until ok holds.
func (r *rig) eventually(what string, ok func() bool) {
	r.Helper()
	patience := slow(15 * time.Second)
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			r.Fatalf("%s: not within %s", what, patience)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (r *rig) exited(a sdk.Attempt) sdk.Container {
	r.Helper()
	var c sdk.Container
	r.eventually(a.String()+" exits", func() bool { c = r.find(a); return c.State == sdk.StateExited })
	return c
}

// listen subscribes to hints; the function it returns waits for one about a,
// after which the plugin has written all it had to about a's exit.
func (r *rig) listen() (hint func(a sdk.Attempt)) {
	hints := make(chan sdk.Attempt, 64)
	ctx, cancel := context.WithCancel(r.Context())
	r.Cleanup(cancel)
	go r.Events(ctx, func(a sdk.Attempt) { hints <- a })
	// Give Events time to subscribe: hints before it are lost by contract.
	<-time.After(100 * time.Millisecond)
	return func(a sdk.Attempt) {
		r.Helper()
		late := time.After(slow(10 * time.Second))
		for {
			select {
			case got := <-hints:
				if got == a {
					return
				}
			case <-late:
				r.Fatalf("no hint at the exit of %s", a)
			}
		}
	}
}

func (r *rig) output(req sdk.StartRequest) string {
	r.Helper()
	raw, err := os.ReadFile(req.Stdout)
	if err != nil {
		r.Fatal(err)
	}
	return string(raw)
}

func (r *rig) attemptDir(a sdk.Attempt) string {
	return filepath.Join(r.state, "tasks", a.Task, "a", a.Container, strconv.Itoa(a.Number))
}

func code(c sdk.Container) string {
	if c.ExitCode == nil {
		return "unknown: " + c.Reason
	}
	return strconv.Itoa(*c.ExitCode)
}

// supervisorOf is the parent of a program of the own mode.
func supervisorOf(t *testing.T, pid int) int {
	t.Helper()
	p, err := record.ReadProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PPID)); string(name) != "belay-supervise\n" {
		t.Fatalf("the parent of %d is %q", pid, name)
	}
	return p.PPID
}
