package process_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/sdk"
)

// onSmallDisk makes a rig whose state is on a disk that can be filled.
func onSmallDisk(t *testing.T) (r *rig, fill, free func()) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r = &rig{T: t, state: dir, mode: process.ModeOwn, task: "0123456789abcdef0123456789abcdef"}
	r.relaunch()
	t.Cleanup(r.cleanUp)
	ballast := filepath.Join(dir, "ballast")
	fill = func() {
		f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 512))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	free = func() {
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
	}
	return r, fill, free
}

func TestFullDiskHidEveryAttemptBehindOneWithoutSupervisor(t *testing.T) {
	r, fill, _ := onSmallDisk(t)
	orphan, other := r.request("orphan", "sleep 600"), r.request("other", "sleep 600")
	c := r.start(orphan)
	r.start(other)
	if err := syscall.Kill(supervisorOf(t, c.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	fill()
	if got, err := r.Stop(t.Context(), orphan.Attempt, time.Second); err != nil || got.State != sdk.StateExited {
		t.Errorf("Stop returned %+v, %v", got, err)
	}
	inv, err := r.List(t.Context())
	if err != nil || len(inv.Containers) != 2 {
		t.Fatalf("List: %+v, %v", inv, err)
	}
	if got := r.find(other.Attempt); got.State != sdk.StateRunning {
		t.Errorf("the other one: %+v", got)
	}
	if got := r.find(orphan.Attempt); got.State != sdk.StateExited || got.ExitCode != nil {
		t.Errorf("the orphan: %+v", got)
	}
}

func TestFullDiskRefusesStartsAndKeepsExits(t *testing.T) {
	r, fill, free := onSmallDisk(t)
	running := r.request("running", "while :; do sleep 0.05; done")
	c := r.start(running)
	fill()
	refused := r.request("refused", "exit 0")
	if got, err := r.Start(t.Context(), refused); !errors.Is(err, sdk.Exhausted) {
		t.Errorf("Start on a full disk: %+v, %v, want exhausted", got, err)
	}
	if err := syscall.Kill(c.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.eventually("the program is gone", func() bool { return syscall.Kill(c.PID, 0) != nil })
	if got := r.find(running.Attempt); got.State == sdk.StateExited && code(got) != "137" {
		t.Errorf("on the full disk its exit is %s", code(got))
	}
	<-time.After(300 * time.Millisecond) // let its supervisor find the disk full
	free()
	if got := r.exited(running.Attempt); code(got) != "137" {
		t.Errorf("exit is %s, want 137", code(got))
	}
	r.start(refused)
	if got := r.exited(refused.Attempt); code(got) != "0" {
		t.Errorf("exit of the one refused before is %s, want 0", code(got))
	}
}
