package containerd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/belay-edge/belay/plugins/sdk"
)

const cdiSpec = `{"cdiVersion":"0.6.0","kind":"example.com/gpu","containerEdits":{"env":["ALL=1"]},"devices":[
	{"name":"0","containerEdits":{"env":["ONE=0"],"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null"}],
	 "hooks":[{"hookName":"createContainer","path":"/bin/true","args":["true"]}]}}]}`

func TestCDIDevicesAreInjected(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "example.json"), []byte(cdiSpec), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := &oci.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	if err := injectCDI(spec, []string{dir}, []string{"example.com/gpu=0"}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"ALL=1", "ONE=0"}, spec.Process.Env); d != "" {
		t.Error(d)
	}
	if len(spec.Linux.Devices) != 1 || spec.Linux.Devices[0].Path != "/dev/gpu0" || spec.Linux.Devices[0].Major != 1 ||
		len(spec.Linux.Resources.Devices) != 1 || !spec.Linux.Resources.Devices[0].Allow || len(spec.Hooks.CreateContainer) != 1 {
		t.Errorf("%+v %+v %+v", spec.Linux.Devices, spec.Linux.Resources, spec.Hooks)
	}
}

func TestWhatCannotBeInjectedIsNamed(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := injectCDI(&oci.Spec{}, []string{dir, "/nowhere"}, []string{"nvidia.com/gpu=7"})
	if !errors.Is(err, sdk.Unavailable) || !strings.Contains(err.Error(), "nvidia.com/gpu=7") || !strings.Contains(err.Error(), dir+", /nowhere") ||
		!strings.Contains(err.Error(), "broken.json") {
		t.Error(err)
	}
}

func TestHooksAreAdded(t *testing.T) {
	spec := &oci.Spec{}
	if err := addHooks(spec, []sdk.Hook{
		{Point: "createRuntime", Path: "/bin/a", Args: []string{"a", "b"}, Env: []string{"X=1"}, Timeout: 1500 * time.Millisecond},
		{Point: "poststop", Path: "/bin/c"},
	}); err != nil {
		t.Fatal(err)
	}
	two := 2
	want := &specs.Hooks{
		CreateRuntime: []specs.Hook{{Path: "/bin/a", Args: []string{"a", "b"}, Env: []string{"X=1"}, Timeout: &two}},
		Poststop:      []specs.Hook{{Path: "/bin/c"}},
	}
	if d := cmp.Diff(want, spec.Hooks); d != "" {
		t.Error(d)
	}
	if err := addHooks(spec, []sdk.Hook{{Point: "later", Path: "/bin/d"}}); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), `"later"`) {
		t.Error(err)
	}
}
