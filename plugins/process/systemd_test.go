package process_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const (
	nspawnEnv = "BELAY_TEST_NSPAWN"      // "1": boot a systemd when this machine has none
	rootEnv   = "BELAY_TEST_NSPAWN_ROOT" // a debootstrap tree to boot, made when it is not there
)

// testUnit is what the booted system runs, and powers off after.
const testUnit = `[Unit]
Wants=dbus.service
After=dbus.service
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=` + binEnv + `=/belay-test TMPDIR=/var/tmp
ExecStart=/bin/sh -c '/belay-test/process.test -test.v >/belay-test/log 2>&1; echo $? >/belay-test/rc'
`

// TestConformanceSystemd runs the suite where systemd is the init. Elsewhere
// it boots one in a container and runs itself there.
func TestConformanceSystemd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("transient units of the system need root")
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		suite(t, "systemd")
		return
	}
	if os.Getenv(nspawnEnv) != "1" {
		t.Skip("systemd is not the init here; " + nspawnEnv + "=1 boots one with systemd-nspawn (needs systemd-container and debootstrap)")
	}
	bootAndTest(t)
}

func bootAndTest(t *testing.T) {
	for _, tool := range []string{"systemd-nspawn", "debootstrap"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: apt-get install systemd-container debootstrap", err)
		}
	}
	root := debianTree(t)
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{self: "process.test", filepath.Join(built, "bin"): "bin"} {
		if out, err := exec.Command("cp", "-a", from, filepath.Join(dir, to)).CombinedOutput(); err != nil {
			t.Fatalf("copy %s: %v: %s", from, err, out)
		}
	}
	unit := filepath.Join(dir, "belay-test.service")
	if err := os.WriteFile(unit, []byte(testUnit), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	boot := exec.CommandContext(ctx, "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay",
		"--directory="+root, "--bind="+dir+":/belay-test", "--bind-ro="+unit+":/etc/systemd/system/belay-test.service",
		"--machine=belay-process-test", "--console=pipe", "--", "--unit=belay-test.service")
	console, err := boot.CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	rc, _ := os.ReadFile(filepath.Join(dir, "rc"))
	t.Logf("inside the container:\n%s", log)
	if string(rc) != "0\n" {
		t.Fatalf("the suite in the container ended with %q; nspawn: %v; console:\n%s", rc, err, console)
	}
}

// debianTree is a minimal Debian with systemd and D-Bus, kept between runs.
func debianTree(t *testing.T) string {
	root := os.Getenv(rootEnv)
	if root == "" {
		root = "/var/cache/belay-test/bookworm"
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin/dbus-daemon")); err == nil {
		return root
	}
	t.Logf("making a Debian tree at %s", root)
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus", "bookworm", root).CombinedOutput()
	if err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, out)
	}
	return root
}
