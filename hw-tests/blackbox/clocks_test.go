package blackbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// TestBoottimeThatJumps runs the agent's lives in time namespaces of their own:
// one decade ahead, then before what it ran was started. Nothing is restarted,
// health checks go on, and new tasks start.
func TestBoottimeThatJumps(t *testing.T) {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	up, _ := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
	back := max(60-int64(up), -1<<40)
	if out, err := exec.Command("unshare", "--time", "--boottime", fmt.Sprint(back), "--fork", "true").CombinedOutput(); err != nil {
		t.Skipf("no time namespaces here: %v: %s", err, out)
	}
	s := newSite(t, "process")
	before := s.run(t, "keep", container{
		"name": "c", "script": waitScript(s.dir, "keep"),
		"healthCheck": map[string]any{"command": []any{"CMD", "/bin/true"}, "interval": 5},
	})
	real := s.agent.Bin
	for life, offset := range []int64{10 * 365 * 24 * 3600, back, 0} {
		// A directory of programs of which the agent is started elsewhere in time.
		moved := rig.Binaries(filepath.Join(s.dir, fmt.Sprintf("bin%d", life)))
		script := fmt.Sprintf("#!/bin/sh\nexec unshare --time --boottime %d --monotonic %d --fork --kill-child %s \"$@\"\n", offset, max(offset, 0), real.Path("belay-agent"))
		if err := os.MkdirAll(string(moved), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(moved.Path("belay-agent"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		s.agent.Kill()
		// The agent is a child of what was killed, and ends a moment later.
		err := rig.Until(deadline(t, patience), nil, "the agent before to end", func() error {
			f, err := os.Open(filepath.Join(s.agent.State, "lock"))
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		})
		if err != nil {
			t.Fatal(err)
		}
		if s.agent.Bin = moved; offset == 0 {
			s.agent.Bin = real
		}
		if err := s.agent.Restart(); err != nil {
			t.Fatal(err)
		}
		s.says(t, "the agent to be connected", func(l local) bool { return l.Link.Connected && l.Tasks["RUNNING"] == 1 })
		s.same(t, fmt.Sprintf("boot time moved by %d s", offset), before)
		s.await(t, before.ID, "its health to be known again", patience, func(t rig.Task) bool { return t.HealthStatus == "HEALTHY" })
		name := fmt.Sprintf("new%d", life)
		task := s.run(t, name, container{"name": "c", "script": waitScript(s.dir, name)})
		release(t, s.dir, name)
		exits(t, s, task.ID, 7)
	}
	s.same(t, "in the end", before)
	release(t, s.dir, "keep")
	exits(t, s, before.ID, 7)
}
