package docker

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/sdk"
)

// writeSpec makes a directory with one CDI specification.
func writeSpec(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "spec.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// plain has two devices of nothing but what Docker can be told.
const plain = `{"cdiVersion":"0.7.0","kind":"example.com/gpu",
	"containerEdits":{"env":["DRIVER=1.2","OWN=theirs"],"additionalGids":[44,0],
		"mounts":[{"hostPath":"/usr","containerPath":"/driver","options":["ro","nosuid","nodev","rbind","rslave"]},
			{"hostPath":"tmpfs","containerPath":"/scratch","type":"tmpfs","options":["size=1m"]}]},
	"devices":[
		{"name":"0","containerEdits":{"env":["GPU=0"],"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null","permissions":"rw"}]}},
		{"name":"1","containerEdits":{"env":["GPU=1"],"deviceNodes":[{"path":"/dev/null"}]}}]}`

// hooked is as nvidia-ctk writes them, shortened: hooks for all devices.
const hooked = `{"cdiVersion":"0.5.0","kind":"KIND",
	"containerEdits":{"hooks":[{"hookName":"createContainer","path":"/usr/bin/nvidia-cdi-hook","args":["nvidia-cdi-hook","update-ldcache"]}]},
	"devices":[
		{"name":"0","containerEdits":{"deviceNodes":[{"path":"/dev/no-such-gpu0"}]}},
		{"name":"1","containerEdits":{"deviceNodes":[{"path":"/dev/no-such-gpu1"}]}}]}`

func TestCDIDevicesInDockersWords(t *testing.T) {
	r := &Runtime{cfg: Config{CDISpecDirs: []string{writeSpec(t, plain)}}}
	own := sdk.ContainerSpec{
		CDIDevices: []string{"example.com/gpu=0", "example.com/gpu=1"}, Env: []string{"OWN=mine"}, AdditionalGIDs: []uint32{44},
		Devices: []sdk.HostDevice{{HostPath: "/dev/zero", ContainerPath: "/dev/gpu0"}, {HostPath: "/dev/full"}},
		Mounts:  []sdk.Mount{{Type: "bind", Source: "/etc", Target: "/driver"}, {Type: "bind", Source: "/etc", Target: "/own", Options: []string{"bind"}}},
	}
	before, err := json.Marshal(own)
	if err != nil {
		t.Fatal(err)
	}
	got, by, err := r.resolve(own, &daemonInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(handed{}, by, cmp.AllowUnexported(handed{})); d != "" {
		t.Error(d)
	}
	a := sdk.Attempt{Task: strings.Repeat("0", 32), Container: "c", Number: 1}
	if err := checkMounts(got.Mounts); err != nil {
		t.Error(err)
	}
	c := r.request(sdk.StartRequest{Attempt: a, Spec: got}, sdk.TaskSpec{}, &daemonInfo{}, by, sdk.NetworkNone, target{}, target{})
	want := hostConfig{
		Devices: []device{{"/dev/full", "/dev/full", "rwm"}, {"/dev/null", "/dev/gpu0", "rw"}, {"/dev/null", "/dev/null", "rwm"}},
		Mounts: []mount{
			{Type: "bind", Source: "/etc", Target: "/own", BindOptions: bindOptions{NonRecursive: true}},
			{Type: "bind", Source: "/usr", Target: "/driver", ReadOnly: true, BindOptions: bindOptions{Propagation: "rslave"}},
		},
		Tmpfs: map[string]string{"/scratch": "size=1m"}, GroupAdd: []string{"44"},
	}
	have := hostConfig{Devices: c.HostConfig.Devices, Mounts: c.HostConfig.Mounts, Tmpfs: c.HostConfig.Tmpfs, GroupAdd: c.HostConfig.GroupAdd}
	if d := cmp.Diff(want, have); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"OWN=mine", "DRIVER=1.2", "OWN=theirs", "GPU=0", "GPU=1"}, c.Env); d != "" {
		t.Errorf("environment (-want +got):\n%s", d)
	}
	if after, _ := json.Marshal(own); string(after) != string(before) {
		t.Errorf("the caller's spec was changed to %s", after)
	}
}

// What only hooks can do is left to who can be told of them, and refused with
// a way out otherwise.
func TestCDIHooksAndDocker(t *testing.T) {
	nvidia := map[string]json.RawMessage{"nvidia": json.RawMessage(`{}`)}
	for _, c := range []struct {
		name, kind string
		own        []string
		daemon     daemonInfo
		want       handed
		env        []string
		refusal    []string
	}{
		{name: "the nvidia runtime", kind: "nvidia.com/gpu", daemon: daemonInfo{Runtimes: nvidia}, own: []string{"NVIDIA_VISIBLE_DEVICES=all"},
			want: handed{runtime: "nvidia"}, env: []string{"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=all", "NVIDIA_VISIBLE_DEVICES=1,0"}},
		{name: "the nvidia runtime, capabilities chosen", kind: "nvidia.com/gpu", daemon: daemonInfo{Runtimes: nvidia}, own: []string{"NVIDIA_DRIVER_CAPABILITIES=video"},
			want: handed{runtime: "nvidia"}, env: []string{"NVIDIA_DRIVER_CAPABILITIES=video", "NVIDIA_VISIBLE_DEVICES=1,0"}},
		{name: "a daemon that knows CDI", kind: "nvidia.com/gpu", daemon: daemonInfo{Runtimes: nvidia, CDISpecDirs: []string{"/etc/cdi"}},
			want: handed{requests: []deviceRequest{{Driver: "cdi", DeviceIDs: []string{"nvidia.com/gpu=1", "nvidia.com/gpu=0"}}}}},
		{name: "no nvidia runtime", kind: "nvidia.com/gpu", refusal: []string{"nvidia.com/gpu=1", "nvidia-cdi-hook", "createContainer", "nvidia-ctk runtime configure", "runtime containerd"}},
		{name: "another vendor", kind: "example.com/npu", daemon: daemonInfo{Runtimes: nvidia}, refusal: []string{"example.com/npu=1", "features.cdi", "runtime containerd"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &Runtime{cfg: Config{CDISpecDirs: []string{writeSpec(t, strings.ReplaceAll(hooked, "KIND", c.kind))}}}
			got, by, err := r.resolve(sdk.ContainerSpec{CDIDevices: []string{c.kind + "=1", c.kind + "=0"}, Env: c.own}, &c.daemon)
			if c.refusal != nil {
				if !errors.Is(err, sdk.Unsupported) {
					t.Fatalf("got %v, want unsupported", err)
				}
				for _, part := range c.refusal {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%v does not say %q", err, part)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, by, cmp.AllowUnexported(handed{})); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if d := cmp.Diff(c.env, got.Env); d != "" || got.CDIDevices != nil || got.Devices != nil {
				t.Errorf("%+v, environment (-want +got):\n%s", got, d)
			}
		})
	}
}

// NVIDIA's runtime, where it is the daemon's default, gives a container every
// GPU that its image asks for unless it is told that the device is given.
func TestPlainNvidiaDeviceIsTheOnlyOne(t *testing.T) {
	text := strings.ReplaceAll(plain, "example.com/gpu", nvidiaKind)
	r := &Runtime{cfg: Config{CDISpecDirs: []string{writeSpec(t, text)}}}
	got, _, err := r.resolve(sdk.ContainerSpec{CDIDevices: []string{nvidiaKind + "=0"}}, &daemonInfo{})
	if err != nil || !hasEnv(got.Env, "NVIDIA_VISIBLE_DEVICES") {
		t.Errorf("environment %q, %v", got.Env, err)
	}
}

func TestCDIRefusals(t *testing.T) {
	node := filepath.Join(t.TempDir(), "node")
	if err := os.WriteFile(node, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	device := func(fields string) string {
		return `{"cdiVersion":"1.1.0","kind":"example.com/gpu","devices":[{"name":"0","containerEdits":{` + fields + `}}]}`
	}
	for _, c := range []struct {
		name, spec string
		kind       sdk.ErrorKind
		says       []string
	}{
		{"no such device", plain, sdk.Unavailable, []string{"example.com/gpu=7", "nvidia-ctk cdi generate"}},
		{"a specification that cannot be read", `{"cdiVersion":`, sdk.Unavailable, []string{"example.com/gpu=0", "spec.json"}},
		{"no such node", device(`"deviceNodes":[{"path":"/dev/no-such"}]`), sdk.NotFound, []string{"/dev/no-such", "plugged in"}},
		{"a node of another number", device(`"deviceNodes":[{"path":"/dev/null","type":"c","major":1,"minor":5}]`), sdk.Unavailable, []string{"1:3", "1:5"}},
		{"a mode the host's node lacks", device(`"deviceNodes":[{"path":"/dev/x","hostPath":"` + node + `","fileMode":438}]`), sdk.Unsupported, []string{"0666", "0600", "udev"}},
		{"an owner the host's node does not have", device(`"deviceNodes":[{"path":"/dev/x","hostPath":"` + node + `","uid":54321}]`), sdk.Unsupported, []string{"54321", "udev"}},
		{"a node without permissions", device(`"deviceNodes":[{"path":"/dev/null","permissions":"none"}]`), sdk.Unsupported, []string{"/dev/null"}},
		{"a network device", device(`"netDevices":[{"hostInterfaceName":"eth7","name":"eth0"}]`), sdk.Unsupported, []string{"eth7"}},
		{"a class of cache", device(`"intelRdt":{"closID":"x"}`), sdk.Unsupported, []string{"intelRdt"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &Runtime{cfg: Config{CDISpecDirs: []string{writeSpec(t, c.spec)}}}
			name := "example.com/gpu=0"
			if c.name == "no such device" {
				name = "example.com/gpu=7"
			}
			_, _, err := r.resolve(sdk.ContainerSpec{CDIDevices: []string{name}}, &daemonInfo{})
			if !errors.Is(err, c.kind) {
				t.Errorf("got %v, want %v", err, c.kind)
			}
			for _, part := range c.says {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("%v does not say %q", err, part)
				}
			}
		})
	}
	r := &Runtime{}
	_, _, err := r.resolve(sdk.ContainerSpec{Hooks: []sdk.Hook{{Point: "poststart", Path: "/bin/true"}}}, &daemonInfo{})
	if !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "poststart") {
		t.Errorf("a hook: %v", err)
	}
}

// A node that others may not open can be opened by whoever its group lets.
func TestCDINodeBringsItsGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a device node")
	}
	node := filepath.Join(t.TempDir(), "node")
	if err := errors.Join(syscall.Mknod(node, syscall.S_IFCHR|0o660, 1<<8|3), os.Chmod(node, 0o660), os.Chown(node, 0, 4711)); err != nil {
		t.Skipf("device nodes cannot be made here: %v", err)
	}
	r := &Runtime{cfg: Config{CDISpecDirs: []string{writeSpec(t,
		`{"cdiVersion":"0.6.0","kind":"example.com/gpu","devices":[{"name":"0","containerEdits":{"deviceNodes":[{"path":"`+node+`","fileMode":432}]}}]}`)}}}
	got, _, err := r.resolve(sdk.ContainerSpec{CDIDevices: []string{"example.com/gpu=0"}}, &daemonInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]uint32{4711}, got.AdditionalGIDs); d != "" {
		t.Errorf("groups (-want +got):\n%s", d)
	}
}
