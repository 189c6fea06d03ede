package blackbox

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// newer writes a copy of the plugins' binary that is another one to whoever
// looks at its bytes, and returns its checksum.
func newer(t *testing.T, to string, addition string) (sum string) {
	t.Helper()
	b, err := os.ReadFile(bin(t).Path("belay-plugins"))
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, addition...) // behind what an ELF file is read for
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(b)
	return hex.EncodeToString(hash[:])
}

// TestUpgradePlugins replaces the runtimes' binary under a running agent, as a
// package manager would: by pointing its links to another file, and at length
// by renaming another file over that. Tasks do not notice.
func TestUpgradePlugins(t *testing.T) {
	runtimes := map[string]*site{"process": nil}
	if os.Getuid() == 0 {
		runtimes["containerd"], runtimes["docker"] = nil, nil
	}
	plugins := tempDir(t)
	if err := os.Chmod(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	libexec := tempDir(t)
	if err := os.Chmod(libexec, 0o755); err != nil {
		t.Fatal(err)
	}
	point := func(to string) {
		t.Helper()
		for name := range runtimes {
			link := filepath.Join(plugins, name)
			if err := os.Symlink(to, link+".new"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(link+".new", link); err != nil {
				t.Fatal(err)
			}
		}
	}
	first := filepath.Join(libexec, "first")
	sums := []string{newer(t, first, "")}
	point(first)
	// The process runtime's helper is looked for beside the plugin.
	helper, err := filepath.Abs(bin(t).Path("belay-supervise"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(helper, filepath.Join(libexec, "belay-supervise")); err != nil {
		t.Fatal(err)
	}

	s := newSiteOf(t, "process", func(s *site, a *rig.Agent) {
		a.PluginDir = plugins
		if len(runtimes) > 1 {
			host(t).prepare(t, a, s.dir)
			config, err := os.ReadFile(a.Config)
			if err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprintf("%s[plugins.docker]\naddress = %q\ncgroup_parent = \"/belay-docker-test\"\n", config, host(t).dockerd(t).Address)
			if err := os.WriteFile(a.Config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	})
	before := map[string]rig.Task{}
	for name := range runtimes {
		if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, name); err != nil {
			t.Fatal(err)
		}
		on := *s
		on.runtime = name
		runtimes[name] = &on
		before[name] = on.run(t, "keep-"+name, container{"name": "c", "script": counting(s.dir, name)})
	}
	second := filepath.Join(libexec, "second")
	upgrades := []func(){
		func() { sums = append(sums, newer(t, second, "2")); point(second) },
		func() {
			sums = append(sums, newer(t, second+".new", "3"))
			if err := os.Rename(second+".new", second); err != nil {
				t.Fatal(err)
			}
		},
	}
	if !atLength() {
		upgrades = upgrades[:1]
	}
	for i, upgrade := range upgrades {
		for name := range runtimes {
			if p := pluginSays(t, s, name, "the plugin to be up", sound); p.Checksum != sums[i] {
				t.Errorf("%s has checksum %s before upgrade %d, want %s", name, p.Checksum, i+1, sums[i])
			}
		}
		upgrade()
		begun := time.Now()
		for name, on := range runtimes {
			p := pluginSays(t, s, name, "the new checksum of "+name, func(p pluginLine) bool { return sound(p) && p.Checksum == sums[i+1] })
			t.Logf("%s: upgraded %s after the file was there", name, time.Since(begun).Round(100*time.Millisecond))
			if p.PID == 0 || p.Restarts != 0 {
				t.Errorf("%s: %+v", name, p)
			}
			now := on.await(t, before[name].ID, "the task to run", patience, running)
			if a, b := now.Container("c"), before[name].Container("c"); a.PID != b.PID || a.Attempt != 1 || a.RuntimeID != b.RuntimeID || !alive(a.PID) {
				t.Errorf("%s: pid %d attempt %d after, pid %d before", name, a.PID, a.Attempt, b.PID)
			}
		}
	}
	for name, on := range runtimes {
		// The new process works: it starts, and sees an exit of what it found.
		next := on.run(t, "next-"+name, container{"name": "c", "script": waitScript(s.dir, "next-"+name)})
		release(t, s.dir, "next-"+name)
		exits(t, on, next.ID, 7)
		release(t, s.dir, name)
		exits(t, on, before[name].ID, 7)
		counted(t, on, before[name].ID)
		if n := starts(t, s.dir, name); n != 1 {
			t.Errorf("%s was started %d times", name, n)
		}
	}
}
