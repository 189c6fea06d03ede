package process_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/sdk"
)

var allLimits = sdk.Limits{CPUShares: 512, CPUQuota: 50_000, MemoryBytes: 64 << 20, Pids: 20}

// cgroupFile reads a file of the cgroup that a process is in.
func cgroupFile(t *testing.T, pid, controller, file string) string {
	t.Helper()
	raw, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, mount := range []string{"/sys/fs/cgroup/" + f[1], "/sys/fs/cgroup"} {
			if f[1] != "" && f[1] != controller {
				continue
			}
			if b, err := os.ReadFile(filepath.Join(mount, f[2], file)); err == nil {
				return strings.TrimSpace(string(b))
			}
		}
	}
	t.Fatalf("no %s of process %s", file, pid)
	return ""
}

func TestLimitsOfTaskAndContainer(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	info, err := r.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][3]string{ // limit: file, value for the container, for the task
		"cpu shares": {"cpu.shares", "512", "256"}, "cpu quota": {"cpu.cfs_quota_us", "50000", "-1"},
		"memory": {"memory.limit_in_bytes", "67108864", "134217728"}, "pids": {"pids.max", "20", "40"},
	}
	switch {
	case info.Attributes["process.cgroups"] == "v2":
		files = map[string][3]string{
			"cpu shares": {"cpu.weight", "20", "10"}, "cpu quota": {"cpu.max", "50000 100000", "max 100000"},
			"memory": {"memory.max", "67108864", "134217728"}, "pids": {"pids.max", "20", "40"},
		}
	case info.Attributes["process.cgroups"] != "v1":
		t.Skip("needs root and writable cgroups")
	}
	task := sdk.TaskSpec{ID: r.task, Limits: sdk.Limits{CPUShares: 256, MemoryBytes: 128 << 20, Pids: 40}}
	for range 2 { // again after a restart of the agent
		if err := r.PrepareTask(t.Context(), task); sdk.KindOf(err) == sdk.Unsupported {
			t.Skipf("this machine's cgroups have not all controllers: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	req := r.request("main", "echo $$; exec sleep 600")
	req.Spec.Limits = allLimits
	r.start(req)
	r.eventually("it says its pid", func() bool { return strings.HasSuffix(r.output(req), "\n") })
	pid := strings.TrimSpace(r.output(req))
	for limit, f := range files {
		controller, _, _ := strings.Cut(f[0], ".")
		if got := cgroupFile(t, pid, controller, f[0]); got != f[1] {
			t.Errorf("%s of the container is %s, want %s", limit, got, f[1])
		}
		if got := cgroupFile(t, pid, controller, "../"+f[0]); got != f[2] {
			t.Errorf("%s of the task is %s, want %s", limit, got, f[2])
		}
	}
	s, err := r.Stats(t.Context(), req.Attempt)
	if err != nil || s.MemoryLimitBytes != 64<<20 || s.Pids != 1 {
		t.Errorf("Stats: %+v, %v", s, err)
	}
	res, err := r.Exec(t.Context(), sdk.ExecRequest{Attempt: req.Attempt, Command: []string{"cat", "/proc/self/cgroup", "/proc/" + pid + "/cgroup"}})
	if lines := strings.Split(strings.TrimSpace(string(res.Output)), "\n"); err != nil || len(lines)%2 != 0 {
		t.Errorf("Exec: %+v, %v", res, err)
	} else if diff := cmp.Diff(lines[len(lines)/2:], lines[:len(lines)/2]); diff != "" {
		t.Errorf("Exec runs in another cgroup: %s", diff)
	}
	if _, err := r.Stop(t.Context(), req.Attempt, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), req.Attempt); err != nil {
		t.Fatal(err)
	}
	if err := r.RemoveTask(t.Context(), r.task); err != nil {
		t.Fatal(err)
	}
	out, _ := exec.Command("find", "/sys/fs/cgroup", "-name", r.task).Output()
	if len(out) > 0 {
		t.Errorf("cgroups are left over:\n%s", out)
	}
}

func TestOutOfMemoryIsSaid(t *testing.T) {
	bothModes(t, func(r *rig) {
		req := r.request("main", "ulimit -v 600000; exec tail /dev/zero")
		req.Spec.Limits.MemoryBytes = 32 << 20
		if _, err := r.Start(r.Context(), req); sdk.KindOf(err) == sdk.Unsupported {
			r.Skipf("no memory limit here: %v", err)
		} else if err != nil {
			r.Fatal(err)
		}
		if got := r.exited(req.Attempt); code(got) != "137" || !got.OOMKilled {
			r.Errorf("exit is %s, OOMKilled %t; want 137, true", code(got), got.OOMKilled)
		}
	})
}

// A child that falls to the memory limit is its program's business: what the
// program makes of it is the exit, as in a container.
func TestOutOfMemoryOfAChildLeavesTheProgram(t *testing.T) {
	bothModes(t, func(r *rig) {
		req := r.request("main", "ulimit -v 600000; tail /dev/zero; echo survived $?; exit 7")
		req.Spec.Limits.MemoryBytes = 32 << 20
		if _, err := r.Start(r.Context(), req); sdk.KindOf(err) == sdk.Unsupported {
			r.Skipf("no memory limit here: %v", err)
		} else if err != nil {
			r.Fatal(err)
		}
		got := r.exited(req.Attempt)
		if out := r.output(req); code(got) != "7" || out != "survived 137\n" {
			r.Errorf("exit is %s after %q (OOMKilled %t, %q); want 7 after its child's 137", code(got), out, got.OOMKilled, got.Reason)
		}
	})
}

// The plugin's own processes must not fall to a limit that only lets one in.
func TestProgramsWereAsSafeFromTheOOMKillerAsTheAgent(t *testing.T) {
	const own = "/proc/self/oom_score_adj"
	before, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, []byte("-900"), 0); err != nil {
		t.Skipf("needs root: %v", err)
	}
	t.Cleanup(func() { _ = os.WriteFile(own, before, 0) })
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "exec sleep 600")
	c := r.start(req)
	got, err := os.ReadFile("/proc/" + strconv.Itoa(c.PID) + "/oom_score_adj")
	if err != nil || strings.TrimSpace(string(got)) != "0" {
		t.Errorf("the program's oom_score_adj is %s, %v, want 0", got, err)
	}
	res, err := r.Exec(t.Context(), sdk.ExecRequest{Attempt: req.Attempt, Command: []string{"cat", own}})
	if err != nil || strings.TrimSpace(string(res.Output)) != "0" {
		t.Errorf("that of a health check's command is %s, %v, want 0", res.Output, err)
	}
}

func TestSmallestPidsLimit(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	for range 10 {
		req := r.request("main", "")
		req.Spec.Command = []string{"/bin/true"}
		req.Spec.Limits.Pids = 1
		if _, err := r.Start(t.Context(), req); sdk.KindOf(err) == sdk.Unsupported {
			t.Skipf("no pids limit here: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
		if got := r.exited(req.Attempt); code(got) != "0" {
			t.Fatalf("exit is %s, want 0", code(got))
		}
		if err := r.Remove(t.Context(), req.Attempt); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSystemdKeepsLimitsAsProperties(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil || os.Geteuid() != 0 {
		t.Skip("systemd is not the init here, or not root")
	}
	r := newRig(t, process.ModeSystemd)
	if err := r.PrepareTask(t.Context(), sdk.TaskSpec{ID: r.task, Limits: sdk.Limits{Pids: 77}}); sdk.KindOf(err) == sdk.Unsupported {
		// systemd would take the property and keep nothing: it must be refused.
		t.Skipf("systemd has no pids controller here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	req := r.request("main", "exec sleep 600")
	req.Spec.Limits = allLimits
	c := r.start(req)
	show := func(unit string) string {
		out, err := exec.Command("systemctl", "show", unit, "-p", "Slice,RemainAfterExit,TasksMax,MemoryMax,MemoryLimit,CPUWeight,CPUShares,CPUQuotaPerSecUSec,Result").CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl show: %v: %s", err, out)
		}
		return string(out)
	}
	got := show(c.RuntimeID)
	for _, want := range [][]string{{"RemainAfterExit=yes"}, {"TasksMax=20"}, {"MemoryMax=67108864", "MemoryLimit=67108864"},
		{"CPUWeight=20", "CPUShares=512"}, {"CPUQuotaPerSecUSec=500ms"}, {"Slice=belay-process-"}} {
		found := false
		for _, w := range want {
			found = found || strings.Contains(got, w)
		}
		if !found {
			t.Errorf("unit has none of %q:\n%s", want, got)
		}
	}
	_, slice, _ := strings.Cut(got, "Slice=")
	slice, _, _ = strings.Cut(slice, "\n")
	if got := show(slice); !strings.Contains(got, "TasksMax=77") {
		t.Errorf("slice %s:\n%s", slice, got)
	}
	// Somebody stops the unit behind our back: systemd forgets it.
	if out, err := exec.Command("systemctl", "stop", c.RuntimeID).CombinedOutput(); err != nil {
		t.Fatalf("systemctl stop: %v: %s", err, out)
	}
	if got := r.exited(req.Attempt); code(got) != "143" && !strings.Contains(got.Reason, "somebody else") {
		t.Errorf("exit is %s (%q), want 143 or unknown because somebody stopped it", code(got), got.Reason)
	}
	if err := r.Remove(t.Context(), req.Attempt); err != nil {
		t.Fatal(err)
	}
	out, _ := exec.Command("systemctl", "list-units", "--all", "--no-legend", "belay-*.service").Output()
	if strings.Contains(string(out), r.task) {
		t.Errorf("units are left over:\n%s", out)
	}
}

// TestWithoutRoot runs this binary again as nobody.
func TestWithoutRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this is without root already")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "nobody")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "process.test")
	if out, err := exec.Command("cp", self, copied).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v: %s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), copied, "-test.v", "-test.run", "^Test[^M]")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), binEnv+"="+built, "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("as nobody: %v\n%s", err, out)
	} else if !strings.Contains(string(out), "--- PASS: TestRefusedWithoutRoot") {
		t.Errorf("it did not run without root:\n%s", out)
	}
}

// TestLeastSharesWithoutRoot: the agent gives them to every container without
// cpu units, so they must not be a limit that is missed.
func TestLeastSharesWithoutRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("TestWithoutRoot runs it as nobody")
	}
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "exit 4")
	req.Spec.Limits = sdk.Limits{CPUShares: 2}
	r.start(req)
	if c := r.exited(req.Attempt); c.ExitCode == nil || *c.ExitCode != 4 {
		t.Errorf("it ended as %+v", c)
	}
}

func TestRefusedWithoutRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("TestWithoutRoot runs it as nobody")
	}
	r := newRig(t, process.ModeOwn)
	for want, change := range map[string]func(*sdk.StartRequest){
		"cpu shares, cpu quota, memory, pids": func(q *sdk.StartRequest) { q.Spec.Limits = allLimits },
		`user "0:0"`:                          func(q *sdk.StartRequest) { q.Spec.User = "0:0" },
		"ulimits": func(q *sdk.StartRequest) {
			q.Spec.Ulimits = []sdk.Ulimit{{Name: "nofile", Soft: 1 << 30, Hard: 1 << 30}}
		},
	} {
		req := r.request("main", "exit 0")
		change(&req)
		if _, err := r.Start(t.Context(), req); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	err := r.PrepareTask(t.Context(), sdk.TaskSpec{ID: r.task, Limits: sdk.Limits{MemoryBytes: 1 << 20}})
	if !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "memory") {
		t.Errorf("PrepareTask with a memory limit: %v", err)
	}
	if inv, err := r.List(t.Context()); err != nil || len(inv.Containers)+len(inv.Tasks) > 0 {
		t.Errorf("refused requests left %+v, %v", inv, err)
	}
}
