package containerd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// unified skips unless cgroup version 2 is all this machine has. The hosts
// that build this often have version 1: `make test-vm` runs it.
func unified(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		t.Skip("this machine has cgroup v1: make test-vm tests v2")
	}
}

// groupOf is the cgroup directory a process is in.
func groupOf(t *testing.T, pid string) string {
	t.Helper()
	path, ok := strings.CutPrefix(strings.TrimSpace(read(t, "/proc/"+pid+"/cgroup")), "0::/")
	if !ok {
		t.Fatalf("process %s has no cgroup of version 2", pid)
	}
	return filepath.Join("/sys/fs/cgroup", path)
}

// values reads one file each of a cgroup.
func values(t *testing.T, dir string, files map[string]string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for f := range files {
		got[f] = strings.TrimSpace(read(t, filepath.Join(dir, f)))
	}
	return got
}

// TestLimitsOfVersion2 reads what the kernel holds, of the container and of
// its task, also after systemd went over the tree it thinks its own.
func TestLimitsOfVersion2(t *testing.T) {
	unified(t)
	w := newWorld(t)
	task := sdk.TaskSpec{Limits: sdk.Limits{CPUShares: 512, CPUQuota: 80000, MemoryBytes: 128 << 20, MemoryReservation: 16 << 20, Pids: 60}}
	a := w.attempt(task)
	q := w.request(a, sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "sleep 600 & sleep 600")
	q.Spec.Limits = sdk.Limits{CPUShares: 256, CPUQuota: 20000, MemoryBytes: 64 << 20, MemoryReservation: 8 << 20, Pids: 30}
	c := w.start(q)
	own := map[string]string{"cpu.weight": "10", "cpu.max": "20000 100000", "memory.max": "67108864", "memory.low": "8388608", "pids.max": "30"}
	above := map[string]string{"cpu.weight": "20", "cpu.max": "80000 100000", "memory.max": "134217728", "memory.low": "16777216", "pids.max": "60"}
	leaf := groupOf(t, strconv.Itoa(c.PID))
	check := func(when string) {
		t.Helper()
		if d := cmp.Diff(own, values(t, leaf, own)); d != "" {
			t.Errorf("%s, limits of the container (-want +got):\n%s", when, d)
		}
		if d := cmp.Diff(above, values(t, filepath.Dir(leaf), above)); d != "" {
			t.Errorf("%s, limits of the task (-want +got):\n%s", when, d)
		}
	}
	check("started")
	if base := filepath.Base(filepath.Dir(leaf)); base != a.Task {
		t.Errorf("the container's cgroup is %s, want one below the task's", leaf)
	}
	if s, err := w.rt.Stats(w.ctx(), a); err != nil || s.Pids == 0 || s.Pids > 3 || s.MemoryLimitBytes != 64<<20 || s.MemoryBytes == 0 || s.MemoryBytes >= 64<<20 || s.CPUNanos == 0 {
		t.Errorf("Stats: %+v, %v", s, err)
	} else {
		t.Logf("Stats: %+v", s)
	}
	if res, err := w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: a, Command: []string{"/bin/cat", "/proc/self/cgroup", "/sys/fs/cgroup/memory.max"}}); err != nil || string(res.Output) != "0::/\n67108864\n" {
		t.Errorf("the container sees %q of its cgroup, %v", res.Output, err)
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		// A scope with its own limits makes systemd write its subtree_control.
		for _, args := range [][]string{{"systemctl", "daemon-reload"}, {"systemd-run", "--scope", "--quiet", "-p", "CPUQuota=50%", "-p", "MemoryMax=64M", "true"}, {"systemctl", "daemon-reexec"}} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", args, err, out)
			}
			check(strings.Join(args[:2], " "))
		}
	}
	task.ID, task.Network = a.Task, sdk.NetworkNone
	if err := w.rt.PrepareTask(w.ctx(), task); err != nil { // as a new agent does
		t.Errorf("PrepareTask again: %v", err)
	}
	check("prepared again")
	if _, err := w.rt.Stop(w.ctx(), a, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.rt.Remove(w.ctx(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(leaf); err == nil {
		t.Errorf("Remove left %s", leaf)
	}
	if err := w.rt.RemoveTask(w.ctx(), a.Task); err != nil {
		t.Fatal(err)
	}
	if out, _ := exec.Command("find", "/sys/fs/cgroup", "-name", "*"+a.Task+"*").Output(); len(out) > 0 {
		t.Errorf("RemoveTask left\n%s", out)
	}
}

// TestOutOfMemoryOfVersion2: the kernel's kill is told from any other, by the
// container's limit and by the task's, of the first process and of a child.
func TestOutOfMemoryOfVersion2(t *testing.T) {
	unified(t)
	w := newWorld(t)
	small := sdk.Limits{MemoryBytes: 32 << 20}
	for name, c := range map[string]struct {
		task, own sdk.Limits
	}{"container": {own: small}, "task": {task: small}} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			c, _ := w.exits(sdk.TaskSpec{Limits: c.task}, images.Workload, func(s *sdk.ContainerSpec) { s.Limits = c.own }, "memory", "100")
			wantExit(t, c, 137)
			if !c.OOMKilled {
				t.Error("the exit does not say that memory ran out")
			}
		})
	}
	t.Run("killed by somebody", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{Limits: small})
		q := w.request(a, sdk.NetworkNone, images.Workload, "sleep")
		w.start(q)
		c, err := w.rt.Stop(w.ctx(), a, 0)
		if err != nil {
			t.Fatal(err)
		}
		wantExit(t, c, 137)
		if c.OOMKilled {
			t.Error("a kill is reported as memory running out")
		}
	})
}
