package sdktest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// testGiven asks for what device plugins give a container, one thing at a
// time: it is there, or Start refuses it as unsupported. A container that runs
// without what it was promised is the one wrong answer.
func testGiven(t T, r *rig) {
	touch, err := exec.LookPath("touch")
	if err != nil {
		t.Fatal(err)
	}
	hooked := filepath.Join(t.TempDir(), "hook")
	for _, e := range []struct {
		what string
		edit func(*sdk.ContainerSpec)
		// seen says in the container's shell that it is there.
		seen string
		// host is a file that comes on the host.
		host string
	}{
		{"a device node", func(s *sdk.ContainerSpec) {
			s.Devices = []sdk.HostDevice{{HostPath: "/dev/zero", ContainerPath: "/dev/sdktest", Permissions: "r"}}
		}, `[ "$(head -c 3 /dev/sdktest | wc -c)" -eq 3 ]`, ""},
		{"a device rule", func(s *sdk.ContainerSpec) {
			s.DeviceRules = []sdk.DeviceRule{{Type: "c", Major: 1, Permissions: "rw"}}
		}, `:`, ""},
		{"a group", func(s *sdk.ContainerSpec) { s.AdditionalGIDs = []uint32{54321} },
			`grep -q '^Groups:.*54321' /proc/self/status`, ""},
		{"a hook", func(s *sdk.ContainerSpec) {
			s.Hooks = []sdk.Hook{{Point: "createRuntime", Path: touch, Args: []string{"touch", hooked}}}
		}, `:`, hooked},
		{"a CDI device that no specification has", func(s *sdk.ContainerSpec) { s.CDIDevices = []string{"sdktest.invalid/none=0"} }, `false`, ""},
	} {
		spec := r.spec(e.seen + " && echo there || echo not there")
		e.edit(&spec)
		req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, spec)
		if _, err := r.runtime.Start(r.ctx(t), req); err != nil {
			// Which kind it is of, where no specification has it, the runtime
			// knows best.
			if kind := sdk.KindOf(err); kind != sdk.Unsupported && !strings.HasPrefix(e.what, "a CDI device") {
				t.Errorf("%s: Start failed with kind %q, want unsupported or a container that has it: %v", e.what, kind, err)
			}
			continue
		}
		r.exit(t, req.Attempt)
		r.eventually(t, "output", func() error {
			if got := readFile(t, req.Stdout); !strings.HasSuffix(got, "there\n") {
				return sdk.Errorf(sdk.Internal, "read", "it holds %.80q", got)
			}
			return nil
		})
		if got := readFile(t, req.Stdout); got != "there\n" {
			t.Errorf("%s was taken by Start, and the container does not have it", e.what)
		}
		if _, err := os.Stat(e.host); e.host != "" && err != nil {
			t.Errorf("%s was taken by Start, and did not run", e.what)
		}
	}
}
