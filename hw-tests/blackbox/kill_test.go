package blackbox

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// pluginPIDs finds the plugin processes of one agent.
func pluginPIDs(agent *rig.Agent) (pids []int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		// pid (name) state ppid
		s := string(b)
		rest := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
		if len(rest) > 1 && rest[1] == strconv.Itoa(agent.PID()) {
			pid, _ := strconv.Atoi(s[:strings.IndexByte(s, ' ')])
			pids = append(pids, pid)
		}
	}
	return pids
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

// victims maps what is killed to how; each returns a function that brings it back.
var victims = map[string]func(t *testing.T, s *site) (restart func(t *testing.T)){
	"agent": func(_ *testing.T, s *site) func(*testing.T) {
		s.agent.Kill()
		return func(t *testing.T) {
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
		}
	},
	"plugin": func(t *testing.T, s *site) func(*testing.T) {
		pids := pluginPIDs(s.agent)
		if len(pids) == 0 {
			t.Fatal("the agent has no plugin process to kill")
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return func(*testing.T) {} // the agent's own business
	},
	"control": func(_ *testing.T, s *site) func(*testing.T) {
		s.Control.Kill()
		return func(t *testing.T) {
			if err := s.Control.Restart(deadline(t, patience)); err != nil {
				t.Fatal(err)
			}
		}
	},
	"all": func(t *testing.T, s *site) func(*testing.T) {
		pids := pluginPIDs(s.agent)
		s.agent.Kill()
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		s.Control.Kill()
		return func(t *testing.T) {
			if err := s.agent.Restart(); err != nil {
				t.Fatal(err)
			}
			if err := s.Control.Restart(deadline(t, patience)); err != nil {
				t.Fatal(err)
			}
		}
	},
}

// waitScript writes a line per start to NAME.starts, then waits for NAME.go
// and exits 7.
func waitScript(dir, name string) string {
	p := filepath.Join(dir, name)
	return fmt.Sprintf("trap 'exit 143' TERM; echo started >> %s.starts; while [ ! -e %s.go ]; do sleep 0.1; done; exit 7", p, p)
}

// starts counts how often a waitScript was started.
func starts(t *testing.T, dir, name string) int {
	b, err := os.ReadFile(filepath.Join(dir, name+".starts"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "started")
}

// backWithin is the promise: 5 s after the restart all is as it was.
const backWithin = 5 * time.Second

func TestKillWhileRunning(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		s := newSite(t, runtime)
		for name, kill := range victims {
			t.Run(name, func(t *testing.T) {
				before := s.run(t, "keep-"+name, container{"name": "c", "script": waitScript(s.dir, name)})
				pid := before.Container("c").PID
				if pid == 0 || !alive(pid) {
					t.Fatalf("the running container's pid is %d, and no such process lives", pid)
				}
				kill(t, s)(t)
				restarted := time.Now()
				after := s.await(t, before.ID, "the task to be RUNNING again in the API, heard from a connected device", backWithin, func(now rig.Task) bool {
					ids, err := s.cli.Connected(deadline(t, backWithin), cluster, 1, runtime)
					return err == nil && len(ids) == 1 && running(now)
				})
				t.Logf("seen RUNNING %s after the restart", time.Since(restarted).Round(time.Millisecond))
				c := after.Container("c")
				if c.PID != pid || c.Attempt != 1 || !alive(pid) {
					t.Errorf("pid %d attempt %d alive %v after, pid %d attempt 1 before", c.PID, c.Attempt, alive(pid), pid)
				}
				if n := starts(t, s.dir, name); n != 1 {
					t.Errorf("the container was started %d times", n)
				}
				release(t, s.dir, name)
				exits(t, s, before.ID, 7)
			})
		}
	})
}

func TestKillWhileItExits(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		s := newSite(t, runtime)
		for name, kill := range victims {
			t.Run(name, func(t *testing.T) {
				before := s.run(t, "exit-"+name, container{"name": "c", "script": waitScript(s.dir, name)})
				pid := before.Container("c").PID
				restart := kill(t, s)
				release(t, s.dir, name)
				if err := rig.Until(deadline(t, patience), nil, "the container to exit", func() error {
					if alive(pid) && !zombie(pid) {
						return fmt.Errorf("process %d lives", pid)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				restart(t)
				exits(t, s, before.ID, 7)
				if n := starts(t, s.dir, name); n != 1 {
					t.Errorf("the container was started %d times", n)
				}
			})
		}
	})
}

func zombie(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(b), ") Z ")
}

func release(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name+".go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// exits waits until the task has stopped with this code in container c.
func exits(t *testing.T, s *site, id string, code int) {
	t.Helper()
	end := s.await(t, id, "the task to stop", patience, stopped)
	if got := end.Container("c").ExitCode; got == nil || *got != code {
		t.Errorf("exit code %v, want %d: %+v", got, code, end)
	}
}

// TestKillAtRandomInstants kills something at a random moment of pull, start
// and stop, 50 times, and looks whether the task still ends as it should, once.
func TestKillAtRandomInstants(t *testing.T) {
	// Every round on containerd pulls; processes have less to interrupt.
	rounds := map[string]int{"containerd": 50, "docker": 50, "process": 20}
	eachRuntime(t, func(t *testing.T, runtime string) {
		seed := uint64(time.Now().UnixNano())
		if v := os.Getenv("BELAY_SEED"); v != "" {
			seed, _ = strconv.ParseUint(v, 10, 64)
		}
		t.Logf("BELAY_SEED=%d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		s := newSite(t, runtime)
		names := []string{"agent", "plugin", "control", "all"}
		n, crashes := rounds[runtime], 0
		if testing.Short() {
			n = 8
		}
		for i := range n {
			name := fmt.Sprintf("r%d", i)
			victim := names[rnd.IntN(len(names))]
			// Five crashes within ten minutes are quarantined, on purpose: the
			// agent's own restart is what clears the count.
			if victim == "plugin" {
				if crashes++; crashes > 3 {
					victim = "agent"
				}
			}
			if victim == "agent" || victim == "all" {
				crashes = 0
			}
			during := []string{"start", "stop"}[rnd.IntN(2)]
			wait := time.Duration(rnd.Int64N(int64(600 * time.Millisecond)))
			c := container{"name": "c", "script": waitScript(s.dir, name), "stopTimeout": 2}
			if s.images() {
				c["image"] = host(t).freshImage(t, i) // a pull every time
			}
			ctx := deadline(t, 2*patience)
			if _, err := s.cli.Connected(ctx, cluster, 1); err != nil {
				t.Fatal(err)
			}
			id, err := s.cli.RunTask(ctx, cluster, s.document(t, name, c), "--client-token", fmt.Sprintf("%d-%s", seed, name))
			if err != nil {
				t.Fatal(err)
			}
			if during == "stop" {
				s.await(t, id, "the task to run", patience, running)
				if _, err := s.cli.Run(ctx, "task", "stop", id); err != nil {
					t.Fatal(err)
				}
			}
			moment(wait)
			victims[victim](t, s)(t)
			what := fmt.Sprintf("round %d: kill %s %s into %s", i, victim, wait, during)
			if during == "start" {
				task := s.await(t, id, what+": the task to run", patience, running)
				if got := task.Container("c"); got.Attempt != 1 || !alive(got.PID) {
					t.Errorf("%s: attempt %d, pid %d alive %v", what, got.Attempt, got.PID, alive(got.PID))
				}
				if err := rig.Until(ctx, nil, "the container to say it started", func() error {
					if starts(t, s.dir, name) == 0 {
						return fmt.Errorf("not yet")
					}
					return nil
				}); err != nil {
					t.Error(what, err)
				}
				release(t, s.dir, name)
			}
			end := s.await(t, id, what+": the task to stop", patience, stopped)
			if got := starts(t, s.dir, name); got != 1 {
				t.Errorf("%s: started %d times: %+v", what, got, end)
			}
			if got := end.Container("c").ExitCode; got == nil || (during == "start" && *got != 7) {
				t.Errorf("%s: exit code %v: %+v", what, got, end)
			}
			if t.Failed() {
				return
			}
		}
	})
}

// moment lets the system run for d: the instant of a kill is the test's input.
func moment(d time.Duration) { <-time.After(d) }
