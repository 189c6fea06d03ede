package blackbox

import (
	"encoding/json"
	"errors"
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

// What becomes of a device whose state directory cannot be written or is
// damaged: the agent starts, keeps tasks running and says what happened.

// local is what the agent says of itself to whoever stands before the device.
type local struct {
	PID  int `json:"pid"`
	Link struct {
		Connected bool
		LastError string
	}
	Tasks    map[string]int
	Problems []string
	Watched  []string
}

func (s *site) local() (l local, err error) {
	out, err := exec.Command(s.Bin.Path("belay-agent"), "status", "--run-dir", s.agent.RunDir, "-o", "json").CombinedOutput()
	if err != nil {
		return l, fmt.Errorf("%w: %s", err, out)
	}
	err = json.Unmarshal(out, &l)
	return l, err
}

// says waits until the agent's status is as expected.
func (s *site) says(t *testing.T, what string, ok func(local) bool) (l local) {
	t.Helper()
	if err := rig.Until(deadline(t, patience), s.agent.Process, what, func() (err error) {
		if l, err = s.local(); err == nil && !ok(l) {
			err = fmt.Errorf("it says %+v", l)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(l.Problems) > 0 {
		t.Logf("problems: %q", l.Problems)
	}
	return l
}

func problem(text string) func(local) bool {
	return func(l local) bool {
		return slices.ContainsFunc(l.Problems, func(p string) bool { return strings.Contains(p, text) })
	}
}

// rerun starts the agent again, as a supervisor would after it was killed.
func (s *site) rerun(t *testing.T) {
	t.Helper()
	s.agent.Kill()
	if err := s.agent.Restart(); err != nil {
		t.Fatal(err)
	}
}

// same looks whether what ran before runs on.
func (s *site) same(t *testing.T, when string, before rig.Task) {
	t.Helper()
	if pid := before.Container("c").PID; !alive(pid) {
		t.Fatalf("%s: the container with pid %d is gone", when, pid)
	}
	if n := starts(t, s.dir, "keep"); n != 1 {
		t.Fatalf("%s: it was started %d times", when, n)
	}
}

// onSmallDisk is a site of processes with its state on a disk of its own.
func onSmallDisk(t *testing.T) (*site, rig.Task) {
	t.Helper()
	dir := tempDir(t)
	smallDisk(t, filepath.Join(dir, "state"), "4m")
	s := &site{Control: newControl(t), runtime: "process", dir: dir}
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, dir, func(*rig.Agent) {})
	if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
		t.Fatal(err)
	}
	return s, s.run(t, "keep", container{"name": "c", "script": waitScript(dir, "keep")})
}

// TestStateThatCannotBeWritten: an agent that finds its disk read-only or full
// starts, keeps what runs, takes over nothing new, and goes on by itself.
func TestStateThatCannotBeWritten(t *testing.T) {
	for name, c := range map[string]struct {
		says  string
		spoil func(t *testing.T, state string) (mend func())
	}{
		"read-only": {"read-only file system", func(t *testing.T, state string) func() {
			// What was open for writing stays so: as on a disk that turned.
			for _, flags := range []uintptr{syscall.MS_BIND, syscall.MS_BIND | syscall.MS_REMOUNT | syscall.MS_RDONLY} {
				if err := syscall.Mount(state, state, "", flags, ""); err != nil {
					t.Fatal(err)
				}
			}
			mounted := true
			mend := func() {
				if mounted {
					mounted = false
					if err := syscall.Unmount(state, syscall.MNT_DETACH); err != nil {
						t.Error(err)
					}
				}
			}
			t.Cleanup(mend)
			return mend
		}},
		"full": {"no space left", func(t *testing.T, state string) func() {
			balloon := filepath.Join(state, "balloon")
			fill(t, balloon)
			return func() {
				if err := os.Remove(balloon); err != nil {
					t.Error(err)
				}
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s, before := onSmallDisk(t)
			s.agent.Kill()
			mend := c.spoil(t, s.agent.State)
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			s.says(t, "the agent to be connected", func(l local) bool { return l.Link.Connected })
			s.same(t, "restarted", before)
			id, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "new", container{"name": "c", "script": waitScript(s.dir, "new")}))
			if err != nil {
				t.Fatal(err)
			}
			s.says(t, "the agent to say that it cannot write", problem(c.says))
			if err := rig.Until(deadline(t, patience), s.agent.Process, "the agent to refuse what is new", func() error {
				if !strings.Contains(s.agent.Tail(20000), "assignments cannot be taken over") {
					return errors.New("not in its log")
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			now := s.await(t, id, "the control plane to hear why", patience, func(t rig.Task) bool { return strings.Contains(t.Note, c.says) })
			if running(now) || starts(t, s.dir, "new") > 0 {
				t.Errorf("started without a record: %+v", now)
			}
			s.rerun(t)
			s.says(t, "the agent to be connected again", func(l local) bool { return l.Link.Connected })
			s.same(t, "restarted again", before)
			l, err := s.local()
			if err != nil {
				t.Fatal(err)
			}
			mend()
			s.await(t, id, "the new task to run once the disk works", patience, running)
			after := s.says(t, "all to be well", func(l local) bool { return l.Link.Connected && len(l.Problems) == 0 })
			if after.PID != l.PID {
				t.Error("the agent was restarted")
			}
			s.same(t, "in the end", before)
			s.sweep(t)
		})
	}
}

// TestDamagedStateOffline: with a task's record damaged and no control plane, the
// agent leaves its container alone however often it starts; when the control
// plane is back the container is its task's again.
func TestDamagedStateOffline(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		for name, damage := range map[string]func(t *testing.T, state, task string){
			"assignment": func(t *testing.T, state, task string) {
				file := filepath.Join(state, "tasks", task, "assignment")
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				b[len(b)-3] ^= 0x10
				if err := os.WriteFile(file, b, 0o600); err != nil {
					t.Fatal(err)
				}
			},
			"assignment gone": func(t *testing.T, state, task string) {
				if err := os.RemoveAll(filepath.Join(state, "tasks", task)); err != nil {
					t.Fatal(err)
				}
			},
			"log of noise": func(t *testing.T, state, _ string) {
				if err := os.WriteFile(filepath.Join(state, "log"), []byte(strings.Repeat("noise{", 500)), 0o600); err != nil {
					t.Fatal(err)
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				s := newSite(t, runtime)
				before := s.run(t, "keep", container{"name": "c", "script": waitScript(s.dir, "keep")})
				s.agent.Kill()
				s.Control.Kill()
				damage(t, s.agent.State, before.ID)
				for round := range 2 {
					if err := s.agent.Restart(); err != nil {
						t.Fatal(err)
					}
					s.says(t, "the agent to say what is damaged", problem("damaged"))
					// Longer than it takes to list and to end a stray.
					moment(2 * time.Second)
					s.same(t, fmt.Sprintf("round %d", round), before)
					s.agent.Kill()
				}
				if err := s.agent.Restart(); err != nil {
					t.Fatal(err)
				}
				if err := s.Control.Restart(deadline(t, patience)); err != nil {
					t.Fatal(err)
				}
				s.says(t, "the damage to be made good", func(l local) bool { return l.Link.Connected && len(l.Problems) == 0 })
				now := s.await(t, before.ID, "the task to run", patience, running)
				if c, was := now.Container("c"), before.Container("c"); c.PID != was.PID || c.Attempt != 1 {
					t.Errorf("pid %d attempt %d, before: pid %d", c.PID, c.Attempt, was.PID)
				}
				s.same(t, "in the end", before)
				release(t, s.dir, "keep")
				exits(t, s, before.ID, 7)
			})
		}
	})
}

// TestDamagedIdentity: an agent that cannot tell who it is keeps its tasks.
func TestDamagedIdentity(t *testing.T) {
	for name, damage := range map[string]func(file string) error{
		"instance.json cut":  func(dir string) error { return os.Truncate(filepath.Join(dir, "instance.json"), 20) },
		"instance.json gone": func(dir string) error { return os.Remove(filepath.Join(dir, "instance.json")) },
		"key.pem empty":      func(dir string) error { return os.Truncate(filepath.Join(dir, "key.pem"), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "process")
			before := s.run(t, "keep", container{"name": "c", "script": waitScript(s.dir, "keep")})
			dir := filepath.Join(s.agent.State, "identity")
			whole := filepath.Join(s.dir, "whole")
			if err := os.CopyFS(whole, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			s.agent.Kill()
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			// There is a copy, which makes it good.
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			s.says(t, "the agent to be itself by the copy", func(l local) bool { return l.Link.Connected })
			s.agent.Kill()
			if err := errors.Join(damage(dir), os.Remove(filepath.Join(dir, "copy.json"))); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := s.agent.Restart(); err != nil {
					t.Fatal(err)
				}
				l := s.says(t, "the agent to say that it is nobody", problem("cannot tell who it is"))
				if l.Tasks["RUNNING"] != 1 || !problem("enroll --force")(l) {
					t.Errorf("it says %+v", l)
				}
				s.same(t, "without an identity", before)
				s.agent.Kill()
			}
			if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(whole))); err != nil {
				t.Fatal(err)
			}
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			s.says(t, "the agent to be back", func(l local) bool { return l.Link.Connected && len(l.Problems) == 0 })
			s.same(t, "in the end", before)
			release(t, s.dir, "keep")
			exits(t, s, before.ID, 7)
		})
	}
}
