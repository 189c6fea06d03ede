package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The agent's own cgroups, of whichever version this machine has: limits are
// in force, kills are counted, everything in a group can be ended, what leaves
// it is left alone, and nothing stays.
func TestGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups take root")
	}
	parent := fmt.Sprint("belay-test-", os.Getpid(), "/plugins")
	g := makeGroup(parent, "some", false)
	if g.lacks != nil {
		t.Skipf("no limits here: %q", g.lacks)
	}
	t.Cleanup(func() {
		g.kill(0)
		g.remove()
		for _, c := range g.limited() {
			_ = syscall.Rmdir(filepath.Dir(filepath.Dir(c.at.dir)))
		}
	})
	if err := g.limit(48<<20, 50); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	read := func(c controller, name string) {
		b, _ := os.ReadFile(filepath.Join(c.dir, name))
		files[name] = strings.TrimSpace(string(b))
	}
	want := map[string]string{"pids.max": "1024"}
	read(g.pids, "pids.max")
	if g.memory.v2 {
		t.Log("version 2")
		read(g.memory, "memory.max")
		want["memory.max"] = "50331648"
	} else {
		t.Log("version 1")
		read(g.memory, "memory.limit_in_bytes")
		want["memory.limit_in_bytes"] = "50331648"
	}
	if g.cpu.v2 {
		read(g.cpu, "cpu.max")
		want["cpu.max"] = "50000 100000"
	} else {
		read(g.cpu, "cpu.cfs_quota_us")
		want["cpu.cfs_quota_us"] = "50000"
	}
	if d := cmp.Diff(want, files); d != "" {
		t.Errorf("limits (-want +got):\n%s", d)
	}

	// A process waits, joins by us, and does what it is told.
	child := func(script string, env ...string) *exec.Cmd {
		t.Helper()
		c := exec.Command("/bin/sh", "-c", "read go; "+script)
		c.Env = append(os.Environ(), env...)
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill() })
		if err := g.join(c.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write([]byte("go\n")); err != nil {
			t.Fatal(err)
		}
		return c
	}
	before, sure := g.kills()
	hog := child(`exec dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null`)
	_ = hog.Wait()
	after, _ := g.kills()
	if ws, ok := hog.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGKILL || after == before {
		t.Errorf("beyond its memory it ended with %s; kills %d, before %d (sure: %t)", hog.ProcessState, after, before, sure)
	}

	family := child(`setsid sleep 987 & sleep 986 & wait`)
	leaver := child(`for f in $(echo $OUT | tr : ' '); do echo 0 >$f || echo cannot leave by $f >&2; done; touch $MARK; sleep 985`,
		"OUT="+strings.Join(g.outlive(), ":"), "MARK="+filepath.Join(t.TempDir(), "left"))
	mark := ""
	for _, kv := range leaver.Env {
		if v, ok := strings.CutPrefix(kv, "MARK="); ok {
			mark = v
		}
	}
	until(t, "three processes in the group", func() bool {
		_, err := os.Stat(mark)
		return err == nil && len(g.processes()) == 3
	})
	mine, _ := groupsOf(os.Getpid())
	its, _ := groupsOf(leaver.Process.Pid)
	if d := cmp.Diff(mine, its); d != "" {
		t.Errorf("one that left is not where we are:\n%s", d)
	}
	g.kill(0)
	if left := g.processes(); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	if err := family.Wait(); err == nil {
		t.Error("it was not killed")
	}
	if err := syscall.Kill(leaver.Process.Pid, 0); err != nil {
		t.Errorf("one that left was killed: %v", err)
	}
	g.remove()
	for _, c := range g.limited() {
		if _, err := os.Stat(c.at.dir); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", c.at.dir, err)
		}
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience())
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("no %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestNamesOfUnits(t *testing.T) {
	u := newUnits("belay/plugins-1a2b", "my-plugin")
	if want := `belay-plugins\x2d1a2b-my\x2dplugin.slice`; u.slice != want {
		t.Errorf("slice %s, want %s", u.slice, want)
	}
	if want := "belay-plugins-1a2b-my-plugin-"; u.scope != want {
		t.Errorf("scope %s, want %s", u.scope, want)
	}
}

func TestSlicesAreFound(t *testing.T) {
	u := newUnits("belay/plugins", "some")
	at := "/belay.slice/belay-plugins.slice/belay-plugins-some.slice"
	scope := "belay-plugins-some-12.scope"
	groups := map[string]string{"name=systemd": at + "/" + scope, "memory": at + "/" + scope, "cpu": at, "pids": "/user.slice", "": "/"}
	if d := cmp.Diff(map[string]string{"name=systemd": at, "memory": at, "cpu": at}, u.find(groups, scope)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestCgroupMounts(t *testing.T) {
	const hybrid = `30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
35 24 0:31 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
36 24 0:32 / /mnt/a\040b rw - cgroup cgroup rw,memory
37 24 0:32 / /elsewhere rw - cgroup cgroup rw,memory
38 24 0:33 / /proc rw - proc proc rw
broken
`
	want := []cgroupMount{
		{"/", "/sys/fs/cgroup/unified", []string{""}},
		{"/", "/sys/fs/cgroup/systemd", []string{"rw", "xattr", "name=systemd"}},
		{"/docker/abc", "/sys/fs/cgroup/cpu,cpuacct", []string{"rw", "cpu", "cpuacct"}},
		{"/", "/mnt/a b", []string{"rw", "memory"}},
	}
	if d := cmp.Diff(want, cgroupMounts(hybrid), cmp.AllowUnexported(cgroupMount{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if c, ok := findController(hybrid, "cpu"); !ok || c.dir != "/sys/fs/cgroup/cpu,cpuacct" || c.v2 {
		t.Errorf("cpu is at %+v, %t", c, ok)
	}
	if c, ok := findController(hybrid, "hugetlb"); ok {
		t.Errorf("hugetlb is at %+v", c)
	}
}

func TestMissingPidfdIsReported(t *testing.T) {
	if why := noPidfd(func(int, int) (int, error) { return -1, syscall.ENOSYS }); !strings.Contains(why, "pidfd") || !strings.Contains(why, "function not implemented on Linux ") {
		t.Errorf("before Linux 5.3 it says %q", why)
	}
	var fd [2]int
	if err := syscall.Pipe(fd[:]); err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd[1])
	if why := noPidfd(func(int, int) (int, error) { return fd[0], nil }); why != "" {
		t.Errorf("where there are, it says %q", why)
	}
}

// What systemd is asked, in the order of its answers.
func TestQuestionsToSystemd(t *testing.T) {
	var asked []string
	answers := map[string]error{}
	u := newUnits("belay/plugins", "some")
	u.ask = func(_ context.Context, method, signature string, args ...string) error {
		asked = append(asked, method+" "+signature+" "+strings.Join(args, " "))
		return answers[method]
	}
	const rest = "MemoryAccounting b true CPUAccounting b true TasksAccounting b true MemoryMax t %s MemorySwapMax t %s CPUQuotaPerSecUSec t %s TasksMax t 1024"
	check := func(what string, err error, wantErr string, want ...string) {
		t.Helper()
		if d := cmp.Diff(want, asked); d != "" {
			t.Errorf("%s (-want +got):\n%s", what, d)
		}
		if wantErr == "" && err != nil || wantErr != "" && (err == nil || !strings.Contains(err.Error(), wantErr)) {
			t.Errorf("%s: %v, want %q", what, err, wantErr)
		}
		asked = nil
	}
	limited := fmt.Sprintf(rest, "1000", "0", "500000")
	start := "StartTransientUnit ssa(sv)a(sa(sv)) belay-plugins-some.slice fail 7 " + limited + " 0"
	set := "SetUnitProperties sba(sv) belay-plugins-some.slice true 7 " + limited
	check("a slice that is new", u.limit(1000, 50), "", start)
	answers["StartTransientUnit"] = errUnitExists
	check("one that is there", u.limit(1000, 50), "", start, set)
	answers["SetUnitProperties"] = errors.New("no")
	check("none to be had", u.limit(1000, 50), "no", start, set)
	answers = map[string]error{}
	check("no limits", u.limit(0, 0), "", "StartTransientUnit ssa(sv)a(sa(sv)) belay-plugins-some.slice fail 7 "+fmt.Sprintf(rest, unlimited, unlimited, unlimited)+" 0")
	answers["StartTransientUnit"] = errors.New("the bus is away")
	_, err := u.join(4711)
	check("no scope to be had", err, "the bus is away",
		"StartTransientUnit ssa(sv)a(sa(sv)) belay-plugins-some-4711.scope fail 4 PIDs au 1 4711 Slice s belay-plugins-some.slice Description s Belay plugin, process 4711 CollectMode s inactive-or-failed 0")
	answers = map[string]error{}
	check("the end", u.stop(), "", "StopUnit ss belay-plugins-some.slice replace")
}
