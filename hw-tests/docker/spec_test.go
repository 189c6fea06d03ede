package docker

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// misc is a device number that opens without doing anything and that no
// container may open unless it is given it.
func misc(t *testing.T) (minor uint32) {
	t.Helper()
	for _, minor := range []uint32{237 /* loop-control */, 229 /* fuse */, 235 /* autofs */, 196 /* vfio */} {
		path := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(10, minor))); err != nil {
			t.Skipf("device nodes cannot be made here: %v", err)
		}
		if f, err := os.Open(path); err == nil {
			f.Close()
			return minor
		}
	}
	t.Skip("this kernel has no harmless device to give away")
	return 0
}

// sees is a script that says what a container has of every field.
const sees = `
echo args "$0" "$@"
echo dir $(pwd)
echo env $TWICE $(tr '\0' '\n' < /proc/$$/environ | grep -c TWICE)
echo id $(id -u) $(id -g) $(id -G | tr ' ' '\n' | sort -n | tr '\n' ' ')
echo host $(hostname)
echo hosts $(grep -c '10.1.2.3.*friend' /etc/hosts)
echo dns $(grep -E '^(nameserver|search)' /etc/resolv.conf | tr '\n' ' ')
echo nofile $(ulimit -n) $(ulimit -Hn)
echo core $(ulimit -c)
echo init $(cat /proc/1/comm)
echo caps $(grep CapBnd /proc/self/status | tr -d '\t')
echo newprivs $(grep NoNewPrivs /proc/self/status | tr -d '\t')
echo shm $(df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2)
echo sysctl $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start 2>/dev/null)
echo root $(touch /x 2>/dev/null && echo writable || echo read-only)
echo scratch $(touch /scratch/x 2>/dev/null && echo writable) $(grep -q ' /scratch ' /proc/mounts && df -k /scratch | tail -1 | tr -s ' ' | cut -d' ' -f2)
echo mounted $(cat /mounted/file 2>/dev/null) $(touch /mounted/x 2>/dev/null && echo writable || echo read-only)
echo given $(cat /dev/given 2>/dev/null && echo reads) $( (echo x > /dev/given) 2>/dev/null && echo writes)
echo tty $(test -t 0 && echo yes || echo no)
`

// TestEveryField starts containers with every field there is and with none,
// and has them say what they got.
func TestEveryField(t *testing.T) {
	w := newWorld(t, "")
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("here"), 0o644); err != nil {
		t.Fatal(err)
	}
	none := w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", sees, "a")
	want := map[string]string{
		"args": "a", "dir": "/", "env": "0", "id": "0 0 0", "host": none.Attempt.Task[:12], "hosts": "0", "init": "sh", "newprivs": "NoNewPrivs:0",
		"caps": "CapBnd:00000000a80425fb", "shm": "65536", "root": "writable", "scratch": "", "mounted": "read-only", "given": "writes" /* a file */, "tty": "no",
	}
	got := w.says(none)
	for _, k := range []string{"nofile", "core", "dns", "sysctl"} { // the daemon's own defaults
		delete(got, k)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("without anything (-want +got):\n%s", d)
	}

	all := w.request(sdk.TaskSpec{Network: sdk.NetworkBridge}, images.Shell, "-c", sees, "b", "c d")
	s := &all.Spec
	s.EntryPoint, s.WorkingDir, s.User, s.AdditionalGIDs, s.Hostname = []string{"/bin/sh"}, "/tmp", "1000:1001", []uint32{4711}, "device"
	s.Env = []string{"TWICE=first", "OTHER=x", "TWICE=second"}
	s.ExtraHosts, s.DNSServers, s.DNSSearch = []sdk.HostEntry{{Name: "friend", Address: "10.1.2.3"}}, []string{"10.9.9.9"}, []string{"shop.example"}
	s.Ulimits = []sdk.Ulimit{{Name: "nofile", Soft: 100, Hard: 200}, {Name: "core", Soft: math.MaxUint64, Hard: math.MaxUint64}}
	s.Init, s.SecurityOptions, s.ShmBytes = true, []string{"no-new-privileges", "seccomp:unconfined"}, 1<<20
	s.CapabilitiesAdd, s.CapabilitiesDrop = []string{"NET_ADMIN"}, []string{"ALL"}
	s.Sysctls, s.ReadOnlyRoot = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}, true
	s.Mounts = []sdk.Mount{{Type: "tmpfs", Target: "/scratch", Options: []string{"size=2m", "mode=1777"}}, {Type: "bind", Source: dir, Target: "/mounted", Options: []string{"ro", "nosuid"}}}
	s.Devices = []sdk.HostDevice{{HostPath: "/dev/null", ContainerPath: "/dev/given", Permissions: "r"}}
	s.Labels, s.Terminal, s.StdinOpen = map[string]string{"com.example.shelf": "7"}, true, true
	got = w.says(all)
	want = map[string]string{
		"args": "b c d", "dir": "/tmp", "env": "second 1", "id": "1000 1001 1001 4711", "host": "device", "hosts": "1",
		"dns": "search shop.example nameserver 10.9.9.9", "nofile": "100 200", "core": "unlimited", "init": "docker-init", "newprivs": "NoNewPrivs:1",
		"caps": "CapBnd:0000000000001000", "shm": "1024", "sysctl": "80", "root": "read-only", "scratch": "writable 2048", "mounted": "here read-only",
		// Everybody may use the number of /dev/null: permissions are seen below.
		"given": "reads writes", "tty": "yes",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("with everything (-want +got):\n%s", d)
	}
	var found struct {
		Config struct {
			OpenStdin bool
			Labels    map[string]string
		}
	}
	askDaemon(t, w, all.Attempt, &found)
	if !found.Config.OpenStdin || found.Config.Labels["com.example.shelf"] != "7" {
		t.Errorf("the daemon has %+v", found)
	}
}

// TestDevicePermissions: a node can be used as it was given, and a rule makes
// nodes usable that come later.
func TestDevicePermissions(t *testing.T) {
	w := newWorld(t, "")
	minor := misc(t)
	node := filepath.Join(t.TempDir(), "node")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, minor))); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`
echo given $( (: < /dev/given) 2>/dev/null && echo reads) $( (: > /dev/given) 2>/dev/null && echo writes)
mknod /own c 10 %d && echo own $( (: < /own) 2>/dev/null && echo reads)
echo caps $(grep CapBnd /proc/self/status | tr -d '\t')
`, minor)
	for _, c := range []struct {
		name string
		set  func(*sdk.ContainerSpec)
		want map[string]string
	}{
		{"nothing", func(*sdk.ContainerSpec) {}, map[string]string{"given": "writes", "own": "", "caps": "CapBnd:00000000a80425fb"}}, // a file in /dev
		{"read only", func(s *sdk.ContainerSpec) {
			s.Devices = []sdk.HostDevice{{HostPath: node, ContainerPath: "/dev/given", Permissions: "r"}}
		}, map[string]string{"given": "reads", "own": "reads", "caps": "CapBnd:00000000a80425fb"}},
		{"everything", func(s *sdk.ContainerSpec) {
			s.Devices = []sdk.HostDevice{{HostPath: node, ContainerPath: "/dev/given"}}
		}, map[string]string{"given": "reads writes", "own": "reads", "caps": "CapBnd:00000000a80425fb"}},
		{"a rule", func(s *sdk.ContainerSpec) {
			s.DeviceRules = []sdk.DeviceRule{{Type: "c", Major: 10, Permissions: "rm"}}
		}, map[string]string{"given": "writes", "own": "reads", "caps": "CapBnd:00000000a80425fb"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", script)
			c.set(&q.Spec)
			if d := cmp.Diff(c.want, w.says(q)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
	t.Run("privileged", func(t *testing.T) {
		q := w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", script)
		q.Spec.Privileged = true
		// Docker gives every capability that the kernel has; a machine that is
		// a sandbox may not have them all to give.
		bounding := strings.TrimSpace(strings.TrimPrefix(grep(t, "/proc/self/status", "CapBnd:"), "CapBnd:"))
		last, err := strconv.Atoi(strings.TrimSpace(read(t, "/proc/sys/kernel/cap_last_cap")))
		if err != nil {
			t.Fatal(err)
		}
		if bounding != fmt.Sprintf("%016x", uint64(1)<<(last+1)-1) {
			if _, err := w.rt.Start(w.ctx(), q); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), "privileged") {
				t.Errorf("on a machine without all capabilities: %v", err)
			}
			return
		}
		if got := w.says(q); got["own"] != "reads" || got["caps"] != "CapBnd:"+bounding {
			t.Errorf("%v, the host has %s", got, bounding)
		}
	})
}

func grep(t *testing.T, path, prefix string) string {
	for line := range strings.Lines(read(t, path)) {
		if strings.HasPrefix(line, prefix) {
			return line
		}
	}
	t.Fatalf("%s has no %s", path, prefix)
	return ""
}

// TestLimits reads what the kernel holds, of the container and of its task.
func TestLimits(t *testing.T) {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		t.Skip("this machine has cgroup v2 only; the files read here are those of v1")
	}
	w := newWorld(t, "")
	swappiness, swap := uint64(10), int64(0)
	q := w.request(sdk.TaskSpec{Limits: sdk.Limits{CPUShares: 512, CPUQuota: 80000, MemoryBytes: 128 << 20, MemoryReservation: 16 << 20, Pids: 60}},
		images.Shell, "/bin/sh", "-c", "sleep 600 & sleep 600")
	q.Spec.Limits = sdk.Limits{CPUShares: 256, CPUQuota: 20000, MemoryBytes: 64 << 20, MemoryReservation: 8 << 20, Swappiness: &swappiness, MemorySwap: &swap, Pids: 30}
	c, err := w.rt.Start(w.ctx(), q)
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]string{"cpu/cpu.shares": "256", "cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "67108864",
		"memory/memory.soft_limit_in_bytes": "8388608", "memory/memory.swappiness": "10", "pids/pids.max": "30"}
	above := map[string]string{"cpu/cpu.shares": "512", "cpu/cpu.cfs_quota_us": "80000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "134217728",
		"memory/memory.soft_limit_in_bytes": "16777216", "pids/pids.max": "60"}
	at := map[string]string{}
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/cgroup", c.PID))) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, controller := range strings.Split(f[1], ",") {
			at[controller] = f[2]
		}
	}
	for what, limits := range map[string]map[string]string{"container": own, "task": above} {
		got := map[string]string{}
		for k := range limits {
			controller, file, _ := strings.Cut(k, "/")
			dir := at[controller]
			if what == "task" {
				dir = filepath.Dir(dir)
			}
			got[k] = strings.TrimSpace(read(t, filepath.Join("/sys/fs/cgroup", controller, dir, file)))
		}
		if d := cmp.Diff(limits, got); d != "" {
			t.Errorf("limits of the %s (-want +got):\n%s", what, d)
		}
	}

	// Past its memory a container is killed, and that is said.
	q = w.request(sdk.TaskSpec{}, images.Shell, "/bin/sh", "-c", "x=x; while :; do x=$x$x; done")
	q.Spec.Limits = sdk.Limits{MemoryBytes: 16 << 20, MemorySwap: &swap}
	if _, err := w.rt.Start(w.ctx(), q); err != nil {
		t.Fatal(err)
	}
	// Docker hears of it from its containerd, which does not look where a
	// hierarchy that the kernel has is not mounted.
	blind := strings.Contains(read(t, w.d.Log()), "cannot find cgroup mount destination")
	if c := w.exit(q.Attempt); c.OOMKilled == blind || c.ExitCode == nil || *c.ExitCode != 137 {
		t.Errorf("out of memory: %+v, exit code %d, blind %v", c, *c.ExitCode, blind)
	}
}

// TestRefusals: what Docker cannot do, or not here, is refused by name.
func TestRefusals(t *testing.T) {
	w := newWorld(t, "")
	_, selinux := os.Stat("/sys/fs/selinux/enforce")
	_, apparmor := os.Stat("/sys/kernel/security/apparmor")
	swap := int64(1 << 20)
	for _, c := range []struct {
		name string
		skip bool
		task sdk.TaskSpec
		set  func(*sdk.ContainerSpec)
		kind sdk.ErrorKind
		says string
	}{
		{name: "ulimit", set: func(s *sdk.ContainerSpec) { s.Ulimits = []sdk.Ulimit{{Name: "patience"}} }, kind: sdk.Invalid, says: "patience"},
		{name: "ulimit the wrong way round", set: func(s *sdk.ContainerSpec) { s.Ulimits = []sdk.Ulimit{{Name: "nofile", Soft: 2, Hard: 1}} }, kind: sdk.Invalid, says: "nofile"},
		{name: "capability", set: func(s *sdk.ContainerSpec) { s.CapabilitiesAdd = []string{"FLY"} }, kind: sdk.Invalid, says: "FLY"},
		{name: "sysctl", set: func(s *sdk.ContainerSpec) { s.Sysctls = map[string]string{"vm.overcommit_memory": "1"} }, kind: sdk.Invalid, says: "vm.overcommit_memory"},
		{name: "device", set: func(s *sdk.ContainerSpec) { s.Devices = []sdk.HostDevice{{HostPath: "/dev/no-such"}} }, kind: sdk.NotFound, says: "/dev/no-such"},
		{name: "tmpfs option", set: func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "tmpfs", Target: "/x", Options: []string{"shiny"}}}
		}, kind: sdk.Invalid, says: "shiny"},
		{name: "mount option", set: func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "bind", Source: "/", Target: "/x", Options: []string{"idmap"}}}
		}, kind: sdk.Unsupported, says: "idmap"},
		{name: "mount source", set: func(s *sdk.ContainerSpec) { s.Mounts = []sdk.Mount{{Type: "bind", Source: "/no/such", Target: "/x"}} }, kind: sdk.Invalid, says: "/no/such"},
		{name: "shared memory of the host", task: sdk.TaskSpec{IPCMode: "host"}, set: func(s *sdk.ContainerSpec) { s.ShmBytes = 1 << 20 }, kind: sdk.Unsupported, says: "sharedMemorySize"},
		{name: "swap alone", set: func(s *sdk.ContainerSpec) { s.Limits.MemorySwap = &swap }, kind: sdk.Invalid, says: "maxSwap"},
		{name: "seccomp profile", set: func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"seccomp:/x.json"} }, kind: sdk.Unsupported, says: "seccomp:/x.json"},
		{name: "SELinux", skip: selinux == nil, set: func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"label:type:x_t"} }, kind: sdk.Unsupported, says: "SELinux"},
		{name: "AppArmor", skip: apparmor == nil, set: func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"apparmor:mine"} }, kind: sdk.Unsupported, says: "AppArmor"},
		{name: "port of nobody's", set: func(s *sdk.ContainerSpec) {
			s.Ports = []sdk.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 80}}
		}, kind: sdk.Invalid, says: "bridge"},
		{name: "user", set: func(s *sdk.ContainerSpec) { s.User = "nobody-here" }, kind: sdk.Invalid, says: "nobody-here"},
		{name: "hook", set: func(s *sdk.ContainerSpec) { s.Hooks = []sdk.Hook{{Point: "poststart", Path: "/bin/true"}} }, kind: sdk.Unsupported, says: "poststart"},
		{name: "label", set: func(s *sdk.ContainerSpec) { s.Labels = map[string]string{"belay.task": "x"} }, kind: sdk.Invalid, says: "belay.task"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.skip {
				t.Skip("this machine has it")
			}
			q := w.request(c.task, images.Shell, "/bin/sh", "-c", "exit 0")
			c.set(&q.Spec)
			_, err := w.rt.Start(w.ctx(), q)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v that says %q", err, c.kind, c.says)
			}
		})
	}
	for name, task := range map[string]sdk.TaskSpec{"pidMode": {PIDMode: "task"}, "ipcMode": {IPCMode: "task"}} {
		task.ID, task.Network = strings.Repeat("0", 32), sdk.NetworkNone
		if err := w.rt.PrepareTask(w.ctx(), task); !errors.Is(err, sdk.Unsupported) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s task: %v", name, err)
		}
	}
	// Nothing of all that is left.
	if inv, err := w.rt.List(w.ctx()); err != nil || len(inv.Containers) > 0 {
		t.Errorf("left behind: %+v, %v", inv.Containers, err)
	}
}
