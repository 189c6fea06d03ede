package docker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// TestCDIDevices gives containers devices of a CDI specification by a daemon
// that knows nothing of CDI: nodes, groups, mounts, environment.
func TestCDIDevices(t *testing.T) {
	minor := misc(t)
	specs, driver := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Chmod(driver, 0o755), os.WriteFile(filepath.Join(driver, "lib"), []byte("1.2"), 0o644)); err != nil {
		t.Fatal(err)
	}
	// Two nodes, which only a group may use.
	for _, id := range []string{"0", "1"} {
		node := filepath.Join(driver, "node"+id)
		if err := errors.Join(unix.Mknod(node, unix.S_IFCHR|0o660, int(unix.Mkdev(10, minor))), os.Chmod(node, 0o660), os.Chown(node, 0, 4711)); err != nil {
			t.Skipf("device nodes cannot be made here: %v", err)
		}
	}
	text := fmt.Sprintf(`{"cdiVersion":"0.7.0","kind":"example.com/gpu","containerEdits":{"env":["DRIVER=1.2"],"mounts":[
		{"hostPath":%[1]q,"containerPath":"/driver","options":["ro","nosuid","nodev","rbind","rprivate"]}]},"devices":[
		{"name":"0","containerEdits":{"env":["GPU=0"],"additionalGids":[44],"deviceNodes":[{"path":"/dev/gpu0","hostPath":"%[2]s0","permissions":"rw"}]}},
		{"name":"1","containerEdits":{"env":["GPU=1"],"deviceNodes":[{"path":"/dev/gpu1","hostPath":"%[2]s1"}]}},
		{"name":"late","containerEdits":{"deviceNodes":[{"path":"/dev/gpu9","hostPath":"%[2]s9"}]}}]}`, driver, filepath.Join(driver, "node"))
	if err := os.WriteFile(filepath.Join(specs, "example.json"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	hooked := `{"cdiVersion":"0.5.0","kind":"KIND","containerEdits":{"hooks":[{"hookName":"createContainer","path":"/bin/true"}]},
		"devices":[{"name":"0","containerEdits":{"env":["BY=cdi"]}}]}`
	for _, kind := range []string{"nvidia.com/gpu", "example.com/npu"} {
		if err := os.WriteFile(filepath.Join(specs, strings.ReplaceAll(kind, "/", "-")+".json"), []byte(strings.ReplaceAll(hooked, "KIND", kind)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, fmt.Sprintf(`,"cdi_spec_dirs":[%q]`, specs))
	ask := func(device string) sdk.StartRequest {
		q := w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", `
echo env $OWN $DRIVER $GPU $BY
echo lib $(cat /driver/lib 2>/dev/null) $(touch /driver/x 2>/dev/null && echo writable)
echo nodes $(ls /dev | grep gpu)
echo gpu0 $( (: <> /dev/gpu0) 2>/dev/null && echo opens)
echo groups $(id -G)
echo nvidia $NVIDIA_VISIBLE_DEVICES $NVIDIA_DRIVER_CAPABILITIES`)
		q.Spec.CDIDevices, q.Spec.Env, q.Spec.User = []string{device}, []string{"OWN=1"}, "1000:1000"
		return q
	}
	if d := cmp.Diff(map[string]string{"env": "1 1.2 0", "lib": "1.2", "nodes": "gpu0", "gpu0": "opens", "groups": "1000 44 4711", "nvidia": ""}, w.says(ask("example.com/gpu=0"))); d != "" {
		t.Errorf("a plain device (-want +got):\n%s", d)
	}

	// The other device's node cannot be used, though it has the same number:
	// it is not there.
	if d := cmp.Diff(map[string]string{"env": "1 1.2 1", "lib": "1.2", "nodes": "gpu1", "gpu0": "", "groups": "1000 4711", "nvidia": ""}, w.says(ask("example.com/gpu=1"))); d != "" {
		t.Errorf("the other device (-want +got):\n%s", d)
	}

	// By hooks: NVIDIA's runtime does it from the name. Here it is runc.
	q := ask("nvidia.com/gpu=0")
	if d := cmp.Diff(map[string]string{"env": "1", "lib": "", "nodes": "", "gpu0": "", "groups": "1000", "nvidia": "0 all"}, w.says(q)); d != "" {
		t.Errorf("by the nvidia runtime (-want +got):\n%s", d)
	}
	var found struct{ HostConfig struct{ Runtime string } }
	askDaemon(t, w, q.Attempt, &found)
	if found.HostConfig.Runtime != "nvidia" {
		t.Errorf("it ran with runtime %q", found.HostConfig.Runtime)
	}

	for device, c := range map[string]struct {
		kind sdk.ErrorKind
		says string
	}{
		"example.com/npu=0":    {sdk.Unsupported, "features.cdi"},
		"example.com/gpu=7":    {sdk.Unavailable, specs},
		"example.com/gpu=late": {sdk.NotFound, "node9"},
	} {
		if _, err := w.rt.Start(w.ctx(), ask(device)); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), device) {
			t.Errorf("%s: %v", device, err)
		}
	}
	// The specification is read for every start, as is what it names.
	node := filepath.Join(driver, "node9")
	if err := errors.Join(unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, minor))), os.Chmod(node, 0o666)); err != nil {
		t.Fatal(err)
	}
	if got := w.says(ask("example.com/gpu=late")); got["nodes"] != "gpu9" || got["groups"] != "1000" {
		t.Errorf("a node that came later: %v", got)
	}
}

// askDaemon reads what the daemon has of an attempt.
func askDaemon(t *testing.T, w *world, a sdk.Attempt, v any) {
	t.Helper()
	ask(t, w.d, fmt.Sprintf("/containers/belay-%s-%s-%d/json", a.Task, a.Container, a.Number), v)
}
