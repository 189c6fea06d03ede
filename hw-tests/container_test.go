package hwtests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// nobody is who opens devices in containers: what it may open it may by the
// groups it was given.
const nobody = 65534

// reach is what a program in a container reports (probe).
type reach struct {
	Opened, Found map[string]string
}

// missingForContainers says why no container can be run here; "" when one can.
func missingForContainers() string {
	switch _, err := exec.LookPath("runc"); {
	case os.Getuid() != 0:
		return "it takes root"
	case err != nil:
		return "runc is not installed"
	}
	return ""
}

// runProbe runs the probe in a container of runc's that has these edits and
// nothing else; forbidden nodes are made in its root, which it must not open.
func runProbe(t *testing.T, user uint32, e sdk.Edits, named []string, forbidden ...sysfs.Node) reach {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	root := filepath.Join(dir, "rootfs")
	for _, d := range []string{"proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	buildProbe(t, filepath.Join(root, "probe"))
	for _, n := range forbidden {
		if err := unix.Mknod(filepath.Join(root, filepath.Base(n.Path)), unix.S_IFCHR|0o666, int(unix.Mkdev(n.Major, n.Minor))); err != nil {
			t.Fatal(err)
		}
	}
	spec := ociSpec(t, user, e, named)
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("belay-devices-%d-%d", os.Getpid(), time.Now().UnixNano())
	state := filepath.Join(dir, "state")
	cmd := exec.CommandContext(ctx, "runc", "--root", state, "run", "--bundle", dir, id)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	_ = exec.Command("runc", "--root", state, "delete", "--force", id).Run()
	if err != nil {
		t.Fatalf("run the probe in a container: %v\n%s", err, &stderr)
	}
	var r reach
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatalf("the probe said %q: %v", &stdout, err)
	}
	return r
}

// ociSpec puts edits into a container as a runtime plugin does.
func ociSpec(t *testing.T, user uint32, e sdk.Edits, named []string) specs.Spec {
	t.Helper()
	s := specs.Spec{
		Version:  "1.0.2",
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "probe",
		Process: &specs.Process{
			Args: append([]string{"/probe"}, named...), Env: e.Env, Cwd: "/", NoNewPrivileges: true,
			User: specs.User{UID: user, GID: user, AdditionalGids: e.AdditionalGIDs},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}},
			Resources:  &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		},
	}
	for _, d := range e.Devices {
		n, ok := sysfs.New("/").Node(d.HostPath)
		if !ok {
			t.Fatalf("the plugin gives %s, which is no device node", d.HostPath)
		}
		target, mode := d.ContainerPath, os.FileMode(n.Perm)
		if target == "" {
			target = d.HostPath
		}
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: target, Type: string(n.Type), Major: int64(n.Major), Minor: int64(n.Minor), FileMode: &mode, UID: &n.UID, GID: &n.GID})
		major, minor := int64(n.Major), int64(n.Minor)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: string(n.Type), Major: &major, Minor: &minor, Access: d.Permissions})
	}
	for _, r := range e.DeviceRules {
		major := int64(r.Major)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: r.Type, Major: &major, Access: r.Permissions})
	}
	for _, m := range e.Mounts {
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Target, Source: m.Source, Type: "bind", Options: []string{"rbind", "rprivate", mode}})
	}
	return s
}

// checkReach holds a container to having exactly what it was given.
func checkReach(t *testing.T, e sdk.Edits, r reach) {
	t.Helper()
	for name, problem := range r.Opened {
		if problem != "" {
			t.Errorf("the container cannot open %s: %s", name, problem)
		}
	}
	given := map[string]bool{}
	for _, d := range e.Devices {
		given[d.HostPath] = true
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts/ptmx"} { // every container's
		given["/dev/"+name] = true
	}
	for name, problem := range r.Found {
		if given[name] || problem != "" {
			continue
		}
		// A rule gives a directory; each node in it must be of its number.
		n, ok := sysfs.New("/").Node(name)
		allowed := false
		for _, rule := range e.DeviceRules {
			allowed = allowed || ok && n.Major == rule.Major && string(n.Type) == rule.Type
		}
		if !allowed {
			t.Errorf("the container was not given %s and can open it", name)
		}
	}
}

// buildProbe puts the probe, linked statically, at path.
func buildProbe(t *testing.T, path string) {
	t.Helper()
	if *probeFlag != "" {
		b, err := os.ReadFile(*probeFlag)
		if err == nil {
			err = os.WriteFile(path, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	cmd := exec.Command("go", "build", "-o", path, "./probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("no probe: name one with -probe, or install Go")
		}
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
}

// The suite itself is held to noticing a container that has too much or too
// little, with nodes most Linuxes have (not /dev/net/tun: runc gives it to all).
func TestContainersAreHeldToWhatTheyAreGiven(t *testing.T) {
	if why := missingForContainers(); why != "" {
		t.Skip("no container: ", why)
	}
	var there []sysfs.Node
	for _, name := range []string{"/dev/fuse", "/dev/loop-control", "/dev/hwrng"} {
		if n, ok := sysfs.New("/").Node(name); ok {
			there = append(there, n)
		}
	}
	if len(there) < 2 {
		t.Skip("this machine has not two device nodes to try it with")
	}
	given, other := there[0], there[1]
	e := sdk.Edits{Devices: []sdk.HostDevice{{HostPath: given.Path, Permissions: "rw"}}}
	r := runProbe(t, 0, e, []string{given.Path, "/" + filepath.Base(other.Path)}, other)
	if p := r.Opened[given.Path]; p != "" {
		t.Errorf("cannot open what was given: %s", p)
	}
	if p := r.Opened["/"+filepath.Base(other.Path)]; p == "" {
		t.Errorf("can open %s, which was not given", other.Path)
	}
	if _, found := r.Found[given.Path]; !found {
		t.Errorf("%s was not found among %v", given.Path, r.Found)
	}
	delete(r.Opened, "/"+filepath.Base(other.Path))
	checkReach(t, e, r)
	// A rule for a whole major number, as Corals on USB need.
	r = runProbe(t, 0, sdk.Edits{DeviceRules: []sdk.DeviceRule{{Type: "c", Major: other.Major, Permissions: "rw"}}}, []string{"/" + filepath.Base(other.Path)}, other)
	if p := r.Opened["/"+filepath.Base(other.Path)]; p != "" {
		t.Errorf("cannot open %s, which a rule allows: %s", other.Path, p)
	}
}
