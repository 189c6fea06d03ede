package state

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk"
)

func TestOutputs(t *testing.T) {
	dir := t.TempDir()
	o := NewOutputs(dir)
	a := sdk.Attempt{Task: "t1", Container: "main", Number: 1}
	if _, err := o.Read(a, "stdout"); !errors.Is(err, sdk.NotFound) {
		t.Errorf("Read before Open: %v", err)
	}
	stdout, _, err := o.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stdout, []byte("hello\n"), 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := o.Open(a); err != nil { // as when a start is repeated
		t.Fatal(err)
	}
	r, err := o.Read(a, "stdout")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "hello\n" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for n := 2; n <= 9; n++ {
		if _, _, err := o.Open(sdk.Attempt{Task: "t1", Container: "main", Number: n}); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := filepath.Glob(filepath.Join(dir, "outputs/t1/main/*"))
	if err != nil || len(kept) != 2*keepAttempts {
		t.Errorf("%d files are kept of 9 attempts, want %d (%v)", len(kept), 2*keepAttempts, err)
	}
	if err := o.Forget("t1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "outputs/t1")); !os.IsNotExist(err) {
		t.Errorf("after Forget: %v", err)
	}
}

func TestNamesCannotLeaveTheirDirectory(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"", ".", "..", "../x", "a/b", "a\x00b", ".hidden"} {
		if _, _, err := NewOutputs(dir).Open(sdk.Attempt{Task: name, Container: "c", Number: 1}); !errors.Is(err, sdk.Invalid) {
			t.Errorf("output of task %q: %v", name, err)
		}
		if _, _, err := NewOutputs(dir).Open(sdk.Attempt{Task: "t", Container: name, Number: 1}); !errors.Is(err, sdk.Invalid) {
			t.Errorf("output of container %q: %v", name, err)
		}
		if _, err := NewVolumes(dir).Dir("t", name, true); !errors.Is(err, sdk.Invalid) {
			t.Errorf("volume %q: %v", name, err)
		}
	}
}

func TestVolumes(t *testing.T) {
	dir := t.TempDir()
	v := NewVolumes(dir)
	own, err := v.Dir("t1", "data", false)
	if err != nil {
		t.Fatal(err)
	}
	shared, err := v.Dir("t1", "data", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(own, 0o700); err != nil {
		t.Fatal(err)
	}
	if again, err := v.Dir("t1", "data", false); err != nil || again != own {
		t.Errorf("again: %q, %v", again, err)
	}
	if st, err := os.Stat(own); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("what a container did to its volume was undone: %v %v", st.Mode(), err)
	}
	if err := v.Forget("t1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(own); !os.IsNotExist(err) {
		t.Errorf("the task's volume is still there: %v", err)
	}
	if _, err := os.Stat(shared); err != nil {
		t.Errorf("the shared volume is gone: %v", err)
	}
	host := filepath.Join(dir, "host/path")
	if err := v.Host(host); err != nil {
		t.Fatal(err)
	}
	if err := v.Host(host); err != nil {
		t.Errorf("a host path that exists: %v", err)
	}
	if err := v.Host("relative"); !errors.Is(err, sdk.Invalid) {
		t.Errorf("a relative host path: %v", err)
	}
}
