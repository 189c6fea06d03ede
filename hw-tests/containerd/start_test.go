package containerd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// info is what `workload info` prints.
type info struct {
	PID, UID, GID int
	Groups        []int
	Cwd, Hostname string
	Args, Env     []string
	Status        map[string]string
	Limits        map[string][2]uint64
}

// exits runs one container to its end and returns its exit and its output.
func (w *world) exits(task sdk.TaskSpec, image string, change func(*sdk.ContainerSpec), command ...string) (sdk.Container, string) {
	w.t.Helper()
	a := w.attempt(task)
	q := w.request(a, task.Network, image, command...)
	if change != nil {
		change(&q.Spec)
	}
	w.start(q)
	c := w.exit(a)
	// The shim may still be writing; removing waits for it.
	if err := w.rt.Remove(w.ctx(), a); err != nil {
		w.t.Fatalf("Remove: %v", err)
	}
	return c, read(w.t, q.Stdout) + read(w.t, q.Stderr)
}

func (w *world) info(image string, change func(*sdk.ContainerSpec)) info {
	w.t.Helper()
	c, out := w.exits(sdk.TaskSpec{}, image, change, "info")
	wantExit(w.t, c, 0)
	return parseInfo(w.t, out)
}

func parseInfo(t *testing.T, out string) info {
	t.Helper()
	var i info
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return i
}

func TestImageSettings(t *testing.T) {
	w := newWorld(t)
	i := w.info(images.Configured, func(s *sdk.ContainerSpec) { s.Env = []string{"OVERRIDE=task", "ADDED=1"} })
	if i.UID != 1234 || i.GID != 5678 || !slices.Contains(i.Groups, 777) || i.Cwd != "/srv/data" {
		t.Errorf("uid %d gid %d groups %v cwd %s, want the image's user and directory", i.UID, i.GID, i.Groups, i.Cwd)
	}
	for _, e := range []string{"FROM_IMAGE=yes", "OVERRIDE=task", "ADDED=1"} {
		if !slices.Contains(i.Env, e) {
			t.Errorf("environment lacks %s: %v", e, i.Env)
		}
	}
	t.Run("overridden", func(t *testing.T) {
		for user, want := range map[string][2]int{"42": {42, 0}, "42:43": {42, 43}, "root": {0, 0}, "app:extra": {1234, 777}} {
			i := w.info(images.Configured, func(s *sdk.ContainerSpec) { s.User, s.WorkingDir = user, "/tmp" })
			if got := [2]int{i.UID, i.GID}; got != want || i.Cwd != "/tmp" {
				t.Errorf("user %s: %v in %s, want %v in /tmp", user, got, i.Cwd, want)
			}
		}
	})
	t.Run("stop signal", func(t *testing.T) {
		a := w.attempt(sdk.TaskSpec{})
		q := w.request(a, sdk.NetworkNone, images.Configured)
		w.start(q)
		w.eventually("it is ready", func() bool { return strings.Contains(read(t, q.Stdout), "ready") })
		c, err := w.rt.Stop(w.ctx(), a, 20*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		wantExit(t, c, 7)
	})
	t.Run("unknown user", func(t *testing.T) {
		a := w.attempt(sdk.TaskSpec{})
		q := w.request(a, sdk.NetworkNone, images.Configured)
		q.Spec.User = "nobody-here"
		_, err := w.rt.Start(w.ctx(), q)
		wantError(t, err, sdk.Invalid, "nobody-here")
	})
}

func TestSecurity(t *testing.T) {
	w := newWorld(t)
	const net, sysAdmin, chown = 1 << 12, 1 << 21, 1 << 0
	caps := func(i info) uint64 {
		var v uint64
		for _, r := range i.Status["CapEff"] {
			v = v<<4 | uint64(strings.IndexRune("0123456789abcdef", r))
		}
		return v
	}
	for name, c := range map[string]struct {
		change     func(*sdk.ContainerSpec)
		has, lacks uint64
		nnp        string
		seccomp    string
	}{
		"default": {nil, chown, net | sysAdmin, "0", "2"},
		"added":   {func(s *sdk.ContainerSpec) { s.CapabilitiesAdd = []string{"NET_ADMIN"} }, chown | net, sysAdmin, "0", "2"},
		"dropped": {func(s *sdk.ContainerSpec) { s.CapabilitiesDrop = []string{"CHOWN"} }, 0, chown | net, "0", "2"},
		"all dropped": {func(s *sdk.ContainerSpec) {
			s.CapabilitiesDrop, s.CapabilitiesAdd = []string{"ALL"}, []string{"NET_ADMIN"}
		}, net, chown | sysAdmin, "0", "2"},
		"all but": {func(s *sdk.ContainerSpec) {
			s.CapabilitiesAdd, s.CapabilitiesDrop = []string{"ALL"}, []string{"NET_ADMIN"}
		}, chown | sysAdmin, net, "0", "2"},
		"privileged":        {func(s *sdk.ContainerSpec) { s.Privileged = true }, chown | net | sysAdmin, 0, "0", "0"},
		"no new privileges": {func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"no-new-privileges"} }, chown, net, "1", "2"},
		"unconfined":        {func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"seccomp=unconfined"} }, chown, net, "0", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			i := w.info(images.Workload, c.change)
			if got := caps(i); got&c.has != c.has || got&c.lacks != 0 {
				t.Errorf("capabilities %x, want %x and not %x", got, c.has, c.lacks)
			}
			if i.Status["NoNewPrivs"] != c.nnp || i.Status["Seccomp"] != c.seccomp {
				t.Errorf("no new privileges %s, seccomp %s, want %s and %s", i.Status["NoNewPrivs"], i.Status["Seccomp"], c.nnp, c.seccomp)
			}
		})
	}
}

func TestFileSystem(t *testing.T) {
	w := newWorld(t)
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "f"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	nodes := t.TempDir() // with the numbers of /dev/loop-control
	if err := unix.Mknod(filepath.Join(nodes, "x"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 237))); err != nil {
		t.Fatal(err)
	}
	sh := func(script string, change func(*sdk.ContainerSpec)) (int, string) {
		t.Helper()
		c, out := w.exits(sdk.TaskSpec{}, images.Shell, change, "/bin/sh", "-c", script)
		if c.ExitCode == nil {
			t.Fatalf("%+v", c)
		}
		return *c.ExitCode, out
	}
	for name, c := range map[string]struct {
		change func(*sdk.ContainerSpec)
		script string
		code   int
		says   string
	}{
		"writable root":  {nil, "echo x > /file && cat /file", 0, "x\n"},
		"read-only root": {func(s *sdk.ContainerSpec) { s.ReadOnlyRoot = true }, "echo x > /file", 1, "Read-only file system"},
		"bind":           {func(s *sdk.ContainerSpec) { s.Mounts = []sdk.Mount{{Type: "bind", Source: host, Target: "/data"}} }, "cat /data/f; echo -n back > /data/g", 0, "from the host"},
		"read-only bind": {func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "bind", Source: host, Target: "/data", ReadOnly: true}}
		}, "echo x > /data/h", 1, "Read-only file system"},
		"tmpfs": {func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "tmpfs", Target: "/t", Options: []string{"size=4m"}}}
		}, "df -k /t | tail -1 | awk '{print $2}'", 0, "4096\n"},
		"default shm": {nil, "df -k /dev/shm | tail -1 | awk '{print $2}'", 0, "65536\n"},
		"shm size":    {func(s *sdk.ContainerSpec) { s.ShmBytes = 8 << 20 }, "df -k /dev/shm | tail -1 | awk '{print $2}'", 0, "8192\n"},
		"device": {func(s *sdk.ContainerSpec) {
			s.Devices = []sdk.HostDevice{{HostPath: "/dev/loop-control", ContainerPath: "/dev/log0", Permissions: "r"}}
		}, "test -c /dev/log0 && (exec 3</dev/log0) && ! (exec 3>/dev/log0) 2>/dev/null && echo fine", 0, "fine\n"},
		"node in a directory": {func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "bind", Source: nodes, Target: "/nodes", ReadOnly: true}}
		}, "! (exec 3</nodes/x) 2>/dev/null && echo denied", 0, "denied\n"},
		"device rule": {func(s *sdk.ContainerSpec) {
			s.Mounts = []sdk.Mount{{Type: "bind", Source: nodes, Target: "/nodes", ReadOnly: true}}
			s.DeviceRules = []sdk.DeviceRule{{Type: "c", Major: 10, Permissions: "r"}}
		}, "(exec 3</nodes/x) && ! (exec 3<>/nodes/x) 2>/dev/null && echo fine", 0, "fine\n"},
		"hosts":           {func(s *sdk.ContainerSpec) { s.ExtraHosts = []sdk.HostEntry{{Name: "printer", Address: "10.9.8.7"}} }, "grep printer /etc/hosts", 0, "10.9.8.7\tprinter\n"},
		"dns":             {func(s *sdk.ContainerSpec) { s.DNSServers, s.DNSSearch = []string{"9.9.9.9"}, []string{"lan.example"} }, "grep -v options /etc/resolv.conf", 0, "nameserver 9.9.9.9\nsearch lan.example\n"},
		"hostname":        {func(s *sdk.ContainerSpec) { s.Hostname = "box7" }, "hostname; cat /etc/hostname", 0, "box7\nbox7\n"},
		"sysctl":          {func(s *sdk.ContainerSpec) { s.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"} }, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", 0, "77\n"},
		"ulimit":          {func(s *sdk.ContainerSpec) { s.Ulimits = []sdk.Ulimit{{Name: "nofile", Soft: 111, Hard: 222}} }, "ulimit -Sn; ulimit -Hn", 0, "111\n222\n"},
		"stdin is closed": {nil, "cat; echo end", 0, "end\n"},
		"cgroup is seen":  {func(s *sdk.ContainerSpec) { s.Limits.MemoryBytes = 64 << 20 }, "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max", 0, "67108864\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			code, out := sh(c.script, c.change)
			if code != c.code || !strings.Contains(out, c.says) {
				t.Errorf("exit %d, output %q; want %d and %q", code, out, c.code, c.says)
			}
		})
	}
	if got := read(t, filepath.Join(host, "g")); got != "back" {
		t.Errorf("the host sees %q of the container's write", got)
	}
	t.Run("open stdin and terminal", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{})
		q := w.request(a, sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "tty; echo err >&2; cat; echo end")
		q.Spec.StdinOpen, q.Spec.Terminal = true, true
		c := w.start(q)
		w.eventually("it has written", func() bool { return strings.Contains(read(t, q.Stdout), "err") })
		if out := read(t, q.Stdout); !strings.Contains(out, "/dev/pts/0") {
			t.Errorf("no terminal: %q", out)
		}
		if now, ok := w.find(a); !ok || now.State != sdk.StateRunning || now.PID != c.PID {
			t.Errorf("it does not wait for input: %+v", now)
		}
	})
}

func TestLimits(t *testing.T) {
	w := newWorld(t)
	t.Run("memory", func(t *testing.T) {
		w.t = t
		c, _ := w.exits(sdk.TaskSpec{}, images.Workload, func(s *sdk.ContainerSpec) { s.Limits.MemoryBytes = 32 << 20 }, "memory", "100")
		wantExit(t, c, 137)
		if !c.OOMKilled {
			t.Error("the exit does not say that memory ran out")
		}
	})
	t.Run("memory of the task", func(t *testing.T) {
		w.t = t
		c, _ := w.exits(sdk.TaskSpec{Limits: sdk.Limits{MemoryBytes: 32 << 20}}, images.Workload, nil, "memory", "100")
		wantExit(t, c, 137)
	})
	t.Run("far too little memory", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{})
		q := w.request(a, sdk.NetworkNone, images.Workload, "info")
		q.Spec.Limits.MemoryBytes = 100 << 10
		_, err := w.rt.Start(w.ctx(), q)
		wantError(t, err, sdk.Invalid, "memory")
	})
	t.Run("processes", func(t *testing.T) {
		w.t = t
		c, out := w.exits(sdk.TaskSpec{}, images.Shell, func(s *sdk.ContainerSpec) { s.Limits.Pids = 5 }, "/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; exit 0")
		if !strings.Contains(out, "can't fork") {
			t.Errorf("eight processes fit into five: %+v %q", c, out)
		}
	})
	t.Run("cpu", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{Limits: sdk.Limits{CPUShares: 512}})
		q := w.request(a, sdk.NetworkNone, images.Workload, "cpu", "30")
		q.Spec.Limits = sdk.Limits{CPUShares: 256, CPUQuota: 20000}
		w.start(q)
		begun, err := w.rt.Stats(w.ctx(), a)
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Second)
		end, err := w.rt.Stats(w.ctx(), a)
		if err != nil {
			t.Fatal(err)
		}
		if used := time.Duration(end.CPUNanos - begun.CPUNanos); used < 50*time.Millisecond || used > 450*time.Millisecond {
			t.Errorf("used %s of CPU in about a second with a quota of a fifth", used)
		}
	})
}

func TestNothingLeftAfterFailedStart(t *testing.T) {
	w := newWorld(t)
	before := leftovers(t, w)
	for name, c := range map[string]struct {
		change func(*sdk.ContainerSpec)
		kind   sdk.ErrorKind
		says   string
	}{
		"no such program":    {func(s *sdk.ContainerSpec) { s.EntryPoint = []string{"/nothing"} }, sdk.NotFound, "entryPoint"},
		"no such mount":      {func(s *sdk.ContainerSpec) { s.Mounts = []sdk.Mount{{Type: "bind", Source: "/no/such", Target: "/x"}} }, sdk.Invalid, "/no/such"},
		"no such device":     {func(s *sdk.ContainerSpec) { s.Devices = []sdk.HostDevice{{HostPath: "/dev/nothing0"}} }, sdk.NotFound, "/dev/nothing0"},
		"no such rule":       {func(s *sdk.ContainerSpec) { s.DeviceRules = []sdk.DeviceRule{{Type: "x", Major: 1}} }, sdk.Invalid, "device rule"},
		"no such capability": {func(s *sdk.ContainerSpec) { s.CapabilitiesAdd = []string{"FLY"} }, sdk.Invalid, "FLY"},
		"no such ulimit":     {func(s *sdk.ContainerSpec) { s.Ulimits = []sdk.Ulimit{{Name: "wings"}} }, sdk.Invalid, "wings"},
		"no such option":     {func(s *sdk.ContainerSpec) { s.SecurityOptions = []string{"label:type:x"} }, sdk.Unsupported, "label:type:x"},
		"no such sysctl":     {func(s *sdk.ContainerSpec) { s.Sysctls = map[string]string{"net.no.such": "1"} }, sdk.Invalid, "net/no/such"},
		"working directory":  {func(s *sdk.ContainerSpec) { s.WorkingDir = "/workload" }, sdk.Invalid, "working directory"},
		"bad address to bind": {func(s *sdk.ContainerSpec) {
			s.Ports = []sdk.PortMapping{{Protocol: "tcp", HostPort: 45001, ContainerPort: 80, HostIP: "192.0.2.1"}}
		}, sdk.Invalid, "192.0.2.1"},
	} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			a := w.attempt(sdk.TaskSpec{Network: sdk.NetworkBridge})
			q := w.request(a, sdk.NetworkBridge, images.Workload, "info")
			c.change(&q.Spec)
			_, err := w.rt.Start(w.ctx(), q)
			wantError(t, err, c.kind, c.says)
			if got, ok := w.find(a); ok {
				t.Errorf("List has %+v", got)
			}
			if err := w.rt.RemoveTask(w.ctx(), a.Task); err != nil {
				t.Errorf("RemoveTask: %v", err)
			}
		})
	}
	if d := cmp.Diff(before, leftovers(t, w)); d != "" {
		t.Errorf("left behind (-before +after):\n%s", d)
	}
}
