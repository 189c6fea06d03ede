package host

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nspawnEnv set to "1" boots a systemd when this machine has none.
const nspawnEnv = "BELAY_TEST_NSPAWN"

// testUnit is what the booted system runs, and powers off after. A service of
// its own slice, as the agent is.
const testUnit = `[Unit]
Wants=dbus.service
After=dbus.service
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Slice=belay.slice
KillMode=process
Environment=TMPDIR=/var/tmp container=nspawn
ExecStart=/bin/sh -c 'cd /belay-test && ./host.test -test.v >log 2>&1; echo $? >rc'
`

// TestUnderSystemd boots a systemd in a container and runs this package's
// tests there, where cgroups are systemd's.
func TestUnderSystemd(t *testing.T) {
	if os.Getenv(nspawnEnv) != "1" {
		t.Skip(nspawnEnv + "=1 boots a systemd with systemd-nspawn: run make test-systemd")
	}
	root := os.Getenv("BELAY_TEST_NSPAWN_ROOT")
	if root == "" {
		root = "/var/cache/belay-test/bookworm"
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin/busctl")); err != nil {
		if out, err := exec.Command("debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus", "bookworm", root).CombinedOutput(); err != nil {
			t.Fatalf("make a Debian tree: debootstrap: %v\n%s", err, out)
		}
	}
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", self, filepath.Join(dir, "host.test")).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v: %s", err, out)
	}
	unit := filepath.Join(dir, "belay-test.service")
	if err := os.WriteFile(unit, []byte(testUnit), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	console, err := exec.CommandContext(ctx, "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay",
		"--directory="+root, "--bind="+dir+":/belay-test", "--bind-ro="+unit+":/etc/systemd/system/belay-test.service",
		"--machine=belay-host-test", "--console=pipe", "--", "--unit=belay-test.service").CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	rc, _ := os.ReadFile(filepath.Join(dir, "rc"))
	for line := range strings.Lines(string(log)) {
		if !strings.Contains(line, " level=") && !strings.HasPrefix(line, "===") {
			t.Log(strings.TrimRight(line, "\n"))
		}
	}
	if string(rc) != "0\n" {
		t.Fatalf("the tests in the container ended with %q; nspawn: %v; console:\n%s", rc, err, console)
	}
	if !strings.Contains(string(log), "--- PASS: TestUnitsOfPlugins") {
		t.Error("limits by systemd were not tried")
	}
}

// Where there is a systemd, a plugin is in a scope of a slice of its own that
// has the limits, and what it is allowed to let outlive it is not.
func TestUnitsOfPlugins(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil || os.Geteuid() != 0 {
		t.Skip("systemd is not the init here, or this is not root")
	}
	timing := quick
	timing.Ping = time.Second // when limits are tried again, on a machine in a hurry
	f := newFixture(t, timing, nil, "good", "dev", "good-bystander")
	held := func(s Status) bool {
		return s.State == Ready && s.MemoryMax > 0 && !strings.Contains(strings.Join(s.Missing, ";"), "systemd does not answer")
	}
	f.Host.config.LimitGroup = fmt.Sprint("belay/test-", os.Getpid())
	mb := uint64(100 << 20)
	percent := 50
	f.settings.set("good-bystander", Settings{MemoryMax: &mb, CPUMax: &percent}, nil)
	stop := f.start(t)
	show := func(unit string, properties string) string {
		t.Helper()
		out, err := exec.Command("systemctl", "show", unit, "-p", properties).CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl show %s: %v\n%s", unit, err, out)
		}
		return string(out)
	}
	slice := func(name string) string {
		return "belay-test\\x2d" + fmt.Sprint(os.Getpid()) + "-" + escape(name) + ".slice"
	}
	for name, want := range map[string][]string{
		"good":           {fmt.Sprint("MemoryMax=", runtimeMemory), "CPUQuotaPerSecUSec=1s", fmt.Sprint("TasksMax=", maxTasks)},
		"dev":            {fmt.Sprint("MemoryMax=", deviceMemory), "CPUQuotaPerSecUSec=1s"},
		"good-bystander": {fmt.Sprint("MemoryMax=", mb), "CPUQuotaPerSecUSec=500ms"},
	} {
		s := f.wait(t, name, held)
		if s.Missing != nil {
			for _, m := range s.Missing {
				if !strings.Contains(m, "Landlock") && !(os.Getenv("container") != "" && strings.Contains(m, "does not apply")) {
					t.Errorf("%s lacks %q", name, m)
				}
			}
		}
		scope := fmt.Sprintf("belay-test-%d-%s-%d.scope", os.Getpid(), name, s.PID)
		got := show(slice(name), "MemoryMax,CPUQuotaPerSecUSec,TasksMax,ActiveState")
		for _, w := range append(want, "ActiveState=active") {
			if !strings.Contains(got, w) && name != "dev" { // told when its kind is known
				t.Errorf("%s: %s, want %s", slice(name), got, w)
			}
		}
		if got := show(scope, "Slice,ActiveState,ControlGroup"); !strings.Contains(got, "Slice="+slice(name)) || !strings.Contains(got, "ActiveState=active") {
			t.Errorf("%s: %s", scope, got)
		}
	}
	first := f.wait(t, "good", is(Ready))
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	second := f.wait(t, "good", func(s Status) bool { return s.State == Ready && s.PID != first.PID })
	t.Logf("up again after %s", time.Since(killed))
	second = f.wait(t, "good", func(s Status) bool { return held(s) && s.PID != first.PID })
	if second.MemoryMax != runtimeMemory {
		t.Errorf("after a relaunch %+v", second)
	}
	groups, err := groupsOf(second.PID)
	if err != nil {
		t.Fatal(err)
	}
	for controller, path := range groups {
		inScope := controller == "name=systemd" || controller == "" && len(groups) == 1
		inSlice := controller == "memory" && os.Getenv("container") == ""
		if inScope && !strings.HasSuffix(path, fmt.Sprint(second.PID)+".scope") || inSlice && !strings.Contains(path, "/"+slice("good")) {
			t.Errorf("after a relaunch it is in %q of %q", path, controller)
		}
	}
	stop()
	deadline := time.After(patience())
	for strings.Contains(show(slice("good"), "ActiveState"), "=active") {
		select {
		case <-deadline:
			t.Fatalf("the slice stays: %s", show(slice("good"), "ActiveState,ControlGroup"))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
