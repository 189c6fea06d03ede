package containerd

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// cdiSpec describes two devices: nodes that every kernel has, under names of
// our own, and a hook that leaves a file.
func cdiSpec(dir string) string {
	return `{"cdiVersion":"0.6.0","kind":"example.com/gpu","containerEdits":{"env":["DRIVER=1.2"],"mounts":[
		{"hostPath":"` + dir + `","containerPath":"/driver","options":["ro","rbind"]}]},"devices":[
	{"name":"0","containerEdits":{"env":["GPU=0"],"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/zero"}],
	 "hooks":[{"hookName":"createRuntime","path":"/bin/sh","args":["sh","-c","cat >/dev/null; touch ` + dir + `/hooked"]}]}},
	{"name":"1","containerEdits":{"env":["GPU=1"],"deviceNodes":[{"path":"/dev/gpu1","hostPath":"/dev/zero"}]}}]}`
}

// What comes with devices, on a containerd that knows nothing of CDI.
func TestCDIDevicesHooksAndGroups(t *testing.T) {
	specs, driver := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(driver, "lib"), []byte("the driver's library\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(specs, "example.json"), []byte(cdiSpec(driver)), 0o644); err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, `,"cdi_spec_dirs":["`+specs+`"]`)
	hook := filepath.Join(driver, "after")
	c, out := w.exits(sdk.TaskSpec{}, images.Shell, func(s *sdk.ContainerSpec) {
		s.CDIDevices = []string{"example.com/gpu=0"}
		s.Env = []string{"OWN=1"}
		s.Hooks = []sdk.Hook{{Point: "poststop", Path: "/bin/touch", Args: []string{"touch", hook}}}
		s.AdditionalGIDs = []uint32{4711}
		s.User = "1000:1000"
	}, "sh", "-c", "echo $OWN $DRIVER $GPU; cat /driver/lib; ls /dev | grep gpu; head -c 3 /dev/gpu0 | od -An -tx1; id -G")
	wantExit(t, c, 0)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 5 || lines[0] != "1 1.2 0" || lines[1] != "the driver's library" || lines[2] != "gpu0" ||
		strings.TrimSpace(lines[3]) != "00 00 00" || !slices.Contains(strings.Fields(lines[4]), "4711") {
		t.Errorf("the container says %q", lines)
	}
	for _, f := range []string{filepath.Join(driver, "hooked"), hook} {
		if _, err := os.Stat(f); err != nil {
			t.Errorf("a hook did not run: %v", err)
		}
	}

	a := w.attempt(sdk.TaskSpec{})
	q := w.request(a, "", images.Shell, "true")
	q.Spec.CDIDevices = []string{"example.com/gpu=0", "example.com/gpu=7"}
	_, err := w.rt.Start(w.ctx(), q)
	if !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), "example.com/gpu=7") || strings.Contains(err.Error(), "gpu=0") ||
		!strings.Contains(err.Error(), specs) {
		t.Errorf("a device that no specification has: %v", err)
	}
	if inv, err := w.rt.List(w.ctx()); err != nil || len(inv.Containers) != 0 {
		t.Errorf("left behind: %+v, %v", inv.Containers, err)
	}
}
