package rig

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestClose: nothing of a rig is left on the machine.
func TestClose(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd does")
	}
	dir := filepath.Join(t.TempDir(), "c")
	c, err := StartContainerd(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	c.Kill()
	if err := c.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := StartRegistry(t.Context(), filepath.Join(t.TempDir(), "r"), RegistryOptions{Username: "a", Password: "b", TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	address := r.Address
	r.Stop()
	if err := r.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.Address != address {
		t.Errorf("restarted on %s, was on %s", r.Address, address)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is left", dir)
	}
	for pid, args := range processes() {
		if line := strings.Join(args, " "); strings.Contains(line, dir) || strings.Contains(line, r.dir) {
			t.Errorf("process %d is left: %s", pid, line)
		}
	}
}

func TestMissingSaysWhatToDo(t *testing.T) {
	err := lookUp("sh", "no-such-program-1", "no-such-program-2")
	if err == nil || !strings.Contains(err.Error(), "no-such-program-1, no-such-program-2") || !strings.Contains(err.Error(), "setup.sh") {
		t.Errorf("it says: %v", err)
	}
}
