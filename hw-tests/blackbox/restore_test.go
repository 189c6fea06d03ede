package blackbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// instanceDoc is an instance as `belay instance describe -o json` prints it.
type instanceDoc struct {
	ID          string `json:"id"`
	Connected   bool   `json:"connected"`
	ConnectedAt string `json:"connectedAt"`
	Conflict    *struct {
		Reported     bool           `json:"reported"`
		OnlyOnDevice []conflictTask `json:"onlyOnDevice"`
		OnlyInStore  []conflictTask `json:"onlyInStore"`
	} `json:"conflict"`
	Duplicate *struct {
		Hostname string `json:"hostname"`
		Address  string `json:"address"`
	} `json:"duplicate"`
}

type conflictTask struct {
	ID             string `json:"id"`
	TaskDefinition string `json:"taskDefinition"`
	LastStatus     string `json:"lastStatus"`
}

func ids(tasks []conflictTask) (out []string) {
	for _, t := range tasks {
		out = append(out, t.ID)
	}
	slices.Sort(out)
	return out
}

func (s *site) describe(t testing.TB) (i instanceDoc) {
	t.Helper()
	if err := s.cli.JSON(deadline(t, patience), &i, "instance", "describe", s.instance); err != nil {
		t.Fatal(err)
	}
	return i
}

// awaitInstance describes the site's instance until it is as expected.
func (s *site) awaitInstance(t testing.TB, what string, ok func(instanceDoc) bool) (i instanceDoc) {
	t.Helper()
	if err := rig.Until(deadline(t, patience), nil, what, func() error {
		if err := s.cli.JSON(context.Background(), &i, "instance", "describe", s.instance); err != nil {
			return err
		}
		if !ok(i) {
			return fmt.Errorf("instance is %+v, conflict %+v", i, i.Conflict)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return i
}

func (s *site) cmd(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.cli.Run(deadline(t, patience), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// sleeper is a container that runs until it is stopped.
var sleeper = container{"name": "main", "script": "trap 'exit 0' TERM; while :; do sleep 1; done"}

func pid(t rig.Task) int { return t.Container("main").PID }

// copyDir replaces a directory by a copy of another.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

// A control plane restored from an older copy of its data neither rolls a
// device back nor stops what it has forgotten, says so, and lets the operator
// choose.
func TestRestoredControlPlane(t *testing.T) {
	for _, verb := range []string{"adopt", "drop"} {
		t.Run(verb, func(t *testing.T) {
			s := newSiteOf(t, "process", func(s *site, a *rig.Agent) {
				a.Config = filepath.Join(s.dir, "agent.toml")
				if err := os.WriteFile(a.Config, []byte("keep_stopped_tasks = 1\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			})
			kept := s.run(t, "kept", sleeper)
			gone := s.run(t, "gone", sleeper)
			ended := s.run(t, "ended", sleeper)
			unwanted := s.run(t, "unwanted", sleeper)
			s.halt(t)
			backup := filepath.Join(s.dir, "backup")
			copyDir(t, s.Control.Dir, backup)
			s.resume(t)

			// What the backup does not have.
			made := s.run(t, "made", sleeper)
			for _, task := range []rig.Task{gone, ended} { // in this order: the device forgets the first
				s.cmd(t, "task", "stop", task.ID)
				s.await(t, task.ID, "the task to end", patience, stopped)
			}
			s.halt(t)
			copyDir(t, backup, s.Control.Dir)
			s.resume(t)

			i := s.awaitInstance(t, "the conflict to be known", func(i instanceDoc) bool { return i.Conflict != nil && i.Conflict.Reported })
			if got := ids(i.Conflict.OnlyOnDevice); !slices.Equal(got, []string{made.ID}) {
				t.Errorf("only on the device: %v, want %s", got, made.ID)
			}
			if got := ids(i.Conflict.OnlyInStore); !slices.Equal(got, []string{gone.ID}) {
				t.Errorf("only in the store: %v, want %s", got, gone.ID)
			}
			if list := s.cmd(t, "instance", "list"); !strings.Contains(list, "CONFLICT") {
				t.Errorf("instance list does not tell:\n%s", list)
			}
			if text := s.cmd(t, "instance", "describe", s.instance); !strings.Contains(text, made.ID[:12]) || !strings.Contains(text, "belay instance adopt") {
				t.Errorf("instance describe does not tell:\n%s", text)
			}
			// What the store still has as running and the device remembers the
			// end of is told, and what is asked for from now on is done.
			s.await(t, ended.ID, "the end that the store had lost", patience, stopped)
			later := s.run(t, "later", sleeper)
			s.cmd(t, "task", "stop", unwanted.ID)
			s.await(t, unwanted.ID, "a stop asked for in conflict", patience, stopped)
			if pid(later) == 0 {
				t.Errorf("a task made after the restore: %+v", later)
			}
			for _, task := range []rig.Task{kept, made} {
				if !alive(pid(task)) {
					t.Errorf("task %s was stopped by a restore", task.ID)
				}
			}
			if task, err := s.cli.Describe(deadline(t, patience), gone.ID); err != nil || pid(task) != pid(gone) {
				t.Errorf("task %s has run again: %+v, %v", gone.ID, task, err)
			}

			s.cmd(t, "instance", verb, s.instance)
			s.awaitInstance(t, "the conflict to be over", func(i instanceDoc) bool { return i.Conflict == nil })
			switch verb {
			case "adopt":
				now := s.await(t, made.ID, "the adopted task", patience, running)
				if pid(now) != pid(made) || !alive(pid(made)) {
					t.Errorf("adopting restarted task %s: process %d was %d", made.ID, pid(now), pid(made))
				}
				if task := s.await(t, gone.ID, "the end of what the device had ended", patience, stopped); !strings.Contains(task.StoppedReason, "restored") {
					t.Errorf("the reason does not tell: %q", task.StoppedReason)
				}
			case "drop":
				if err := rig.Until(deadline(t, patience), nil, "the dropped task to end", func() error {
					if alive(pid(made)) {
						return fmt.Errorf("process %d lives", pid(made))
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				s.await(t, gone.ID, "what the store wants to run again", patience, func(task rig.Task) bool {
					return running(task) && pid(task) != 0 && pid(task) != pid(gone)
				})
			}
			now, err := s.cli.Describe(deadline(t, patience), kept.ID)
			if err != nil || !running(now) || pid(now) != pid(kept) || !alive(pid(kept)) {
				t.Errorf("what nobody touched has changed: %+v, %v", now, err)
			}
			if out, err := s.cli.Run(deadline(t, patience), "instance", verb, s.instance); err == nil {
				t.Errorf("settled twice: %s", out)
			}
			// And it is over: a restart of either side brings nothing back.
			s.halt(t)
			s.resume(t)
			if i := s.describe(t); i.Conflict != nil {
				t.Errorf("the conflict came back: %+v", i.Conflict)
			}
		})
	}
}

func (s *site) halt(t testing.TB) {
	t.Helper()
	if _, err := s.Control.Stop(20 * time.Second); err != nil {
		t.Fatal(err)
	}
}

func (s *site) resume(t testing.TB) {
	t.Helper()
	if err := s.Control.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, s.runtime); err != nil {
		t.Fatal(err)
	}
}

// A copy of a device's disk in another machine is refused and told why; the
// device it was copied from keeps its session.
func TestCopiedDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("giving a process another machine id needs root")
	}
	s := newSite(t, "process")
	task := s.run(t, "task", sleeper)
	before := s.describe(t)

	dir := tempDir(t)
	twin := &rig.Agent{}
	*twin = *s.agent
	twin.State, twin.RunDir = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	if err := os.MkdirAll(twin.State, 0o700); err != nil {
		t.Fatal(err)
	}
	// Its identity alone: here both share one machine's processes.
	copyDir(t, filepath.Join(s.agent.State, "identity"), filepath.Join(twin.State, "identity"))
	twin.Bin = otherMachine(t, dir, s.agent.Bin)
	if err := twin.Restart(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := twin.Stop(20 * time.Second); err != nil {
			t.Error(err)
		}
	})
	var said string
	if err := rig.Until(deadline(t, patience), nil, "the copy to be refused", func() error {
		out, err := exec.Command(s.agent.Bin.Path("belay-agent"), "status", "--run-dir", twin.RunDir).CombinedOutput()
		if said = string(out); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if !strings.Contains(said, "another machine") {
			return fmt.Errorf("status is %s", said)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said, "not connected") || !strings.Contains(said, "enrol it") {
		t.Errorf("the copy is not told what to do:\n%s", said)
	}
	after := s.awaitInstance(t, "the operator to see it", func(i instanceDoc) bool { return i.Duplicate != nil })
	if !after.Connected || after.ConnectedAt != before.ConnectedAt {
		t.Errorf("the original lost its session: connected %t since %s, before since %s", after.Connected, after.ConnectedAt, before.ConnectedAt)
	}
	if text := s.cmd(t, "instance", "describe", s.instance); !strings.Contains(text, "belay instance rebind") {
		t.Errorf("instance describe does not tell:\n%s", text)
	}
	// The way out, when the copy is the one to stay.
	if _, err := s.agent.Stop(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	// Nobody is left to stop it.
	if now, err := s.cli.Describe(deadline(t, patience), task.ID); err != nil || pid(now) == 0 || syscall.Kill(pid(now), syscall.SIGTERM) != nil {
		t.Errorf("end the task of the original: %+v, %v", now, err)
	}
	s.cmd(t, "instance", "rebind", s.instance)
	if i := s.describe(t); i.Duplicate != nil {
		t.Errorf("after rebind: %+v", i.Duplicate)
	}
}

// otherMachine is the binaries, with an agent that sees another machine id.
func otherMachine(t testing.TB, dir string, bin rig.Binaries) rig.Binaries {
	t.Helper()
	id := filepath.Join(dir, "machine-id")
	if err := os.WriteFile(id, []byte(strings.Repeat("a1", 16)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nexec unshare -m sh -c 'mount --bind %s /etc/machine-id && exec \"$@\"' sh %s \"$@\"\n", id, bin.Path("belay-agent"))
	if err := os.WriteFile(filepath.Join(dir, "belay-agent"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return rig.Binaries(dir)
}
