package docker

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// What the copier holds is the containers', and it must not end with the plugin.
func TestCopierLeavesThePluginsGroup(t *testing.T) {
	procs := filepath.Join(t.TempDir(), "cgroup.procs")
	if err := os.WriteFile(procs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(serve.OutliveKey, procs)
	if code := Copy([]string{CopierName, t.TempDir(), "/nowhere"}); code != 0 {
		t.Errorf("with nothing to copy: exit code %d", code)
	}
	if b, _ := os.ReadFile(procs); string(b) != "0" {
		t.Errorf("it wrote %q to leave", b)
	}
}
