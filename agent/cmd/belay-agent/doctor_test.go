package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

func plant(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// healthy is a device on which every check of files passes.
func healthy(t *testing.T) patient {
	t.Helper()
	root := shortDir(t)
	p := patient{
		cfg: config.Default(), root: root, euid: os.Geteuid(),
		facts: system.Facts{Attributes: map[string]string{"belay.cgroup": "v2", "belay.cgroup.memory": "on"}},
	}
	p.cfg.StateDir = filepath.Join(root, "state")
	p.cfg.PluginDir = filepath.Join(root, "plugins")
	plant(t, filepath.Join(p.cfg.PluginDir, "containerd"), 0o755)
	plant(t, filepath.Join(root, "sys/fs/cgroup/cgroup.controllers"), 0o644)
	for _, name := range []string{"bridge", "host-local", "loopback", "portmap"} {
		plant(t, filepath.Join(root, "usr/lib/cni", name), 0o755)
	}
	if err := os.Mkdir(p.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "run/containerd"), 0o755); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(root, "run/containerd/containerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return p
}

// readOnly puts a read-only file system over dir, with a directory memory in it.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.Mkdir(filepath.Join(dir, "memory"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
}

func TestDoctorFindsWhatIsWrong(t *testing.T) {
	for _, c := range []struct {
		name, check string
		hurt        func(*testing.T, *patient)
		want        string // result
		says        string // in what was found or the advice
	}{
		{"no root", "user", func(_ *testing.T, p *patient) { p.euid = 1000 }, resultWarn, "no containers"},
		{"cgroups", "cgroups", nil, resultOK, "v2, memory controller on"},
		{"hybrid cgroups below systemd's read-only tmpfs", "cgroups", func(t *testing.T, p *patient) {
			p.facts.Attributes["belay.cgroup"] = "hybrid"
			if os.Geteuid() != 0 {
				return
			}
			at := p.path("sys/fs/cgroup")
			readOnly(t, at)
			if err := unix.Mount("tmpfs", at+"/memory", "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(at+"/memory", unix.MNT_DETACH) })
		}, resultOK, "hybrid, memory controller on"},
		{"read-only cgroups", "cgroups", func(t *testing.T, p *patient) {
			if os.Geteuid() != 0 {
				t.Skip("mounting needs root")
			}
			readOnly(t, p.path("sys/fs/cgroup"))
		}, resultFail, "is read-only"},
		{"no cgroups", "cgroups", func(_ *testing.T, p *patient) { p.facts.Attributes = nil }, resultFail, "not mounted"},
		{"Pi without memory controller", "cgroups", func(_ *testing.T, p *patient) {
			p.facts.Attributes["belay.cgroup.memory"] = "off"
			p.facts.Attributes["belay.board.family"] = "raspberry-pi"
		}, resultFail, "/boot/firmware/cmdline.txt"},
		{"state", "state directory", nil, resultOK, "state"},
		{"state not made yet", "state directory", func(_ *testing.T, p *patient) { p.cfg.StateDir += "/x" }, resultOK, "enrolling makes it"},
		{"state is a file", "state directory", func(t *testing.T, p *patient) { p.cfg.StateDir += "/x"; plant(t, p.cfg.StateDir, 0o600) }, resultFail, "not a directory"},
		{"state open to others", "state directory", func(t *testing.T, p *patient) {
			if err := os.Chmod(p.cfg.StateDir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, resultWarn, "chmod 700"},
		{"damaged records", "state directory", func(t *testing.T, p *patient) { plant(t, p.cfg.StateDir+"/damaged/log.1", 0o600) }, resultWarn, "1 damaged records were set aside"},
		{"plugins", "plugins", nil, resultOK, "containerd in"},
		{"no plugin directory", "plugins", func(_ *testing.T, p *patient) { p.cfg.PluginDir += "x" }, resultFail, "--plugin-dir"},
		{"not executable", "plugins", func(t *testing.T, p *patient) { plant(t, p.cfg.PluginDir+"/process", 0o644) }, resultFail, "process is not executable"},
		{"writable by others", "plugins", func(t *testing.T, p *patient) { plant(t, p.cfg.PluginDir+"/process", 0o777) }, resultFail, "chmod go-w"},
		{"configured but missing", "plugins", func(_ *testing.T, p *patient) { p.cfg.SetPlugin("gpu", "x", 1) }, resultWarn, "gpu is configured"},
		{"containerd", "containerd", nil, "", "answers on"},
		{"containerd not running", "containerd", func(_ *testing.T, p *patient) { p.cfg.SetPlugin("containerd", "address", p.path("none.sock")) }, resultFail, "none.sock"},
		{"containerd not needed", "containerd", func(t *testing.T, p *patient) {
			if err := os.Rename(p.cfg.PluginDir+"/containerd", p.cfg.PluginDir+"/process"); err != nil {
				t.Fatal(err)
			}
		}, resultOK, "not needed"},
		{"CNI", "CNI plugins", nil, resultOK, "portmap"},
		{"CNI incomplete", "CNI plugins", func(t *testing.T, p *patient) {
			if err := os.Remove(p.path("usr/lib/cni/portmap")); err != nil {
				t.Fatal(err)
			}
		}, resultWarn, "portmap missing"},
		{"CNI elsewhere", "CNI plugins", func(_ *testing.T, p *patient) {
			p.cfg.SetPlugin("containerd", "cni_bin_dirs", []any{p.path("none")})
		}, resultWarn, "none"},
		{"disk", "disk space", nil, "", "MiB free"},
		{"not enrolled", "control plane", nil, resultWarn, "belay-agent enroll"},
		{"control plane reached", "control plane", func(t *testing.T, p *patient) {
			enrolled(t, p.cfg.StateDir, wiretest.NewControlPlane(t))
		}, resultOK, "reached over quic to"},
		{"another control plane there", "control plane", func(t *testing.T, p *patient) {
			mine, other := wiretest.NewControlPlane(t), wiretest.NewControlPlane(t)
			other.CA = mine.CA
			enrolled(t, p.cfg.StateDir, other)
		}, resultFail, "another key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := healthy(t)
			if c.hurt != nil {
				c.hurt(t, &p)
			}
			for _, check := range checks {
				if check.name != c.check {
					continue
				}
				var all []string
				for _, f := range check.check(t.Context(), p) {
					all = append(all, f.Result+" "+f.Found+" -> "+f.Advice)
					if f.Result != resultOK && f.Advice == "" {
						t.Errorf("no advice with %q", f.Found)
					}
				}
				for _, line := range all {
					if strings.HasPrefix(line, c.want) && strings.Contains(line, c.says) {
						return
					}
				}
				t.Errorf("found %q; want %s with %q", all, c.want, c.says)
				return
			}
			t.Fatalf("there is no check %q", c.check)
		})
	}
}

func TestDoctorExitsByItsFindings(t *testing.T) {
	p := healthy(t)
	p.facts.Attributes = nil // no cgroups: FAIL
	var out bytes.Buffer
	if err := examine(t.Context(), terminal{out: &out}, p, "json"); !errors.Is(err, errReported) {
		t.Errorf("a failed check ended with %v", err)
	}
	var report struct {
		Checks []finding
		Failed int
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil || report.Failed == 0 || len(report.Checks) < len(checks) {
		t.Errorf("%v: %s", err, out.String())
	}
	out.Reset()
	if err := examine(t.Context(), terminal{out: &out}, p, "table"); !errors.Is(err, errReported) || !strings.Contains(out.String(), "FAIL  cgroups") || !strings.Contains(out.String(), "-> mount cgroup2") {
		t.Errorf("%v:\n%s", err, out.String())
	}
}
