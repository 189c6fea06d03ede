package process_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

func TestKilledSupervisorLeavesTheProgramRunning(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "sleep 600 & while :; do sleep 0.1; done")
	c := r.start(req)
	if err := syscall.Kill(supervisorOf(t, c.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := r.find(req.Attempt); got.State != sdk.StateRunning || got.PID != c.PID {
			t.Fatalf("after its supervisor's death: %+v, want pid %d running", got, c.PID)
		}
		r.relaunch()
	}
	if got := r.start(req); got.PID != c.PID {
		t.Fatalf("Start made a second process %d, want %d", got.PID, c.PID)
	}
	hint := r.listen()
	if err := syscall.Kill(c.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	hint(req.Attempt)
	got := r.exited(req.Attempt)
	if got.ExitCode != nil || !strings.Contains(got.Reason, "supervisor was killed") {
		t.Errorf("exit is %s (%q), want unknown because of the supervisor", code(got), got.Reason)
	}
	r.relaunch()
	if again := r.find(req.Attempt); !cmp.Equal(again, got) {
		t.Errorf("the next process tells another end: %s", cmp.Diff(got, again))
	}
}

func TestStopReachesTheProgramOfAKilledSupervisor(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "sleep 600")
	c := r.start(req)
	if err := syscall.Kill(supervisorOf(t, c.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	got, err := r.Stop(t.Context(), req.Attempt, time.Second)
	if err != nil || got.State != sdk.StateExited || got.ExitCode != nil {
		t.Errorf("Stop returned %+v, %v", got, err)
	}
}

func TestLeftoversDieWithTheProgram(t *testing.T) {
	bothModes(t, func(r *rig) {
		req := r.request("main", "setsid sleep 613 & sleep 614 & echo $! >&2; sleep 0.2; exit 4")
		r.start(req)
		if got := r.exited(req.Attempt); code(got) != "4" {
			r.Errorf("exit is %s, want 4", code(got))
		}
		r.eventually("the leftovers are killed", func() bool {
			out, _ := exec.Command("pgrep", "-f", "sleep 61[34]").Output()
			return len(out) == 0
		})
	})
}

func TestRacingStartsMakeOneProcess(t *testing.T) {
	bothModes(t, func(r *rig) {
		runtimes := []sdk.Runtime{r.Runtime}
		r.relaunch()
		runtimes = append(runtimes, r.Runtime)
		for n := range 5 {
			req := r.request("race"+strconv.Itoa(n), "echo started; exec sleep 600")
			var wg sync.WaitGroup
			pids := make([]int, 6)
			for i := range pids {
				wg.Go(func() {
					c, err := runtimes[i%2].Start(r.Context(), req)
					if err != nil {
						r.Errorf("Start: %v", err)
					}
					pids[i] = c.PID
				})
			}
			wg.Wait()
			if pids[0] == 0 || slices.ContainsFunc(pids, func(p int) bool { return p != pids[0] }) {
				r.Errorf("the starts returned processes %v", pids)
			}
			r.eventually("it says so", func() bool { return r.output(req) != "" })
			if got := r.output(req); got != "started\n" {
				r.Errorf("output is %q", got)
			}
		}
	})
}

// The program's supervisor is told by a fault in the launch that nothing was
// started; the next Start must not be disturbed by what the first left.
func TestStartAfterAFailedStart(t *testing.T) {
	bothModes(t, func(r *rig) {
		for range 10 {
			bad := r.request("main", "")
			bad.Spec.Command = []string{"/no/such/program"}
			if _, err := r.Start(r.Context(), bad); sdk.KindOf(err) != sdk.NotFound {
				r.Fatalf("Start of a missing program: %v", err)
			}
			inv, err := r.List(r.Context())
			if err != nil || len(inv.Containers) != 0 {
				r.Fatalf("after a failed Start List has %+v, %v", inv, err)
			}
			good := r.request("main", "exit 5")
			r.start(good)
			if got := r.exited(good.Attempt); code(got) != "5" {
				r.Fatalf("exit is %s, want 5", code(got))
			}
			if err := r.Remove(r.Context(), good.Attempt); err != nil {
				r.Fatal(err)
			}
		}
	})
}

func TestRecordsOfAnotherBoot(t *testing.T) {
	bothModes(t, func(r *rig) {
		hint := r.listen()
		req := r.request("main", "sleep 600")
		c := r.start(req)
		dir := r.attemptDir(req.Attempt)
		p, err := record.ReadProcess(c.PID)
		if err != nil {
			r.Fatal(err)
		}
		elsewhere := record.Started{PID: c.PID, Start: p.Start, Boot: "00000000-0000-0000-0000-000000000000"}
		meta, err := os.ReadFile(filepath.Join(dir, record.MetaFile))
		if err != nil {
			r.Fatal(err)
		}
		if _, err := r.Stop(r.Context(), req.Attempt, 0); err != nil {
			r.Fatal(err)
		}
		// As it would lie there after a power cut and a boot.
		hint(req.Attempt)
		old := strings.Replace(string(meta), record.BootID(), elsewhere.Boot, 1)
		for name, data := range map[string][]byte{record.MetaFile: []byte(old), record.StartedFile: elsewhere.Encode()} {
			if err := record.WriteFile(dir, name, data); err != nil {
				r.Fatal(err)
			}
		}
		if err := os.Remove(filepath.Join(dir, record.ExitFile)); err != nil {
			r.Fatal(err)
		}
		r.relaunch()
		got := r.find(req.Attempt)
		if got.State != sdk.StateExited || got.ExitCode != nil || !strings.Contains(got.Reason, "restarted") {
			r.Errorf("List has %+v, want an exit nobody saw because of the restart", got)
		}
		if again := r.start(req); again.State != sdk.StateExited {
			r.Errorf("Start ran it again: %+v", again)
		}
	})
}

func TestReusedPIDIsNotTheProgram(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "exit 0")
	r.start(req)
	r.exited(req.Attempt)
	dir := r.attemptDir(req.Attempt)
	// The number now belongs to this test, which began at another time.
	started := record.Started{PID: os.Getpid(), Start: 1, Boot: record.BootID()}
	if err := record.WriteFile(dir, record.StartedFile, started.Encode()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, record.ExitFile)); err != nil {
		t.Fatal(err)
	}
	if got := r.find(req.Attempt); got.State != sdk.StateExited || got.ExitCode != nil {
		t.Errorf("List has %+v, want it exited with an unknown code", got)
	}
}

func TestNeverStartedIsCreatedAndStarts(t *testing.T) {
	bothModes(t, func(r *rig) {
		hint := r.listen()
		req := r.request("main", "exit 6")
		r.start(req)
		r.exited(req.Attempt)
		hint(req.Attempt)
		for _, name := range []string{record.StartedFile, record.ExitFile, record.FailedFile} {
			if err := os.Remove(filepath.Join(r.attemptDir(req.Attempt), name)); err != nil {
				r.Fatal(err)
			}
		}
		if got := r.find(req.Attempt); got.State != sdk.StateCreated {
			r.Errorf("List has %+v, want it created", got)
		}
		r.start(req)
		if got := r.exited(req.Attempt); code(got) != "6" {
			r.Errorf("exit is %s, want 6", code(got))
		}
	})
}

func TestDamagedRecordHidesNothing(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	broken, fine := r.request("broken", "exit 0"), r.request("fine", "exit 3")
	r.start(broken)
	r.start(fine)
	r.exited(broken.Attempt)
	if err := os.WriteFile(filepath.Join(r.attemptDir(broken.Attempt), record.MetaFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := r.find(broken.Attempt); got.State != sdk.StateExited || got.ExitCode != nil || !strings.Contains(got.Reason, "damaged") {
		t.Errorf("List has %+v, want an end with the damage as its reason", got)
	}
	if got := r.exited(fine.Attempt); code(got) != "3" {
		t.Errorf("the other's exit is %s, want 3", code(got))
	}
	if err := r.Remove(t.Context(), broken.Attempt); err != nil {
		t.Errorf("Remove: %v", err)
	}
}

// It was listed as exited while its program ran on: an agent would start it
// again beside itself, and Remove left systemd's unit.
func TestDamagedRecordOfARunningProgram(t *testing.T) {
	bothModes(t, func(r *rig) {
		req := r.request("main", "trap '' TERM; while :; do sleep 0.05; done")
		c := r.start(req)
		if err := os.WriteFile(filepath.Join(r.attemptDir(req.Attempt), record.MetaFile), []byte("{"), 0o600); err != nil {
			r.Fatal(err)
		}
		if got := r.find(req.Attempt); got.State != sdk.StateExited || !strings.Contains(got.Reason, "damaged") {
			r.Errorf("List has %+v, want an end with the damage as its reason", got)
		}
		r.eventually("the program has ended", func() bool {
			p, err := record.ReadProcess(c.PID)
			return err != nil || !p.Alive()
		})
		if err := r.Remove(r.Context(), req.Attempt); err != nil {
			r.Errorf("Remove: %v", err)
		}
		again := r.start(req)
		if again.State != sdk.StateRunning || again.PID == c.PID {
			r.Errorf("started anew it is %+v", again)
		}
		if _, err := r.Stop(r.Context(), req.Attempt, 0); err != nil {
			r.Error(err)
		}
	})
}

// Stop said that there is no such attempt while a Start was about to make it.
func TestStopWaitsForAStartUnderWay(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "exit 0")
	if err := r.PrepareTask(t.Context(), sdk.TaskSpec{ID: req.Attempt.Task, Network: sdk.NetworkHost}); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(r.attemptDir(req.Attempt)))), "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // what a Start holds
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Stop(ctx, req.Attempt, 0); err == nil || errors.Is(err, sdk.NotFound) {
		t.Errorf("Stop beside a Start: %v, want that it waits", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Stop(t.Context(), req.Attempt, 0); !errors.Is(err, sdk.NotFound) {
		t.Errorf("Stop after it: %v, want not found", err)
	}
}

func TestProgramFindsACleanPlace(t *testing.T) {
	t.Setenv("BELAY_SECRET_OF_THE_AGENT", "leaked")
	bothModes(t, func(r *rig) {
		// Not closed on execve, as a careless library leaves them.
		fd, err := syscall.Open("/dev/null", syscall.O_RDONLY, 0)
		if err != nil {
			r.Fatal(err)
		}
		defer syscall.Close(fd)
		req := r.request("main", `umask; pwd; grep -E "^Sig(Ign|Blk)" /proc/self/status; for f in /proc/$$/fd/*; do readlink $f; done; env | sort | grep -v ^PWD; ulimit -n; grep NoNewPrivs /proc/self/status`)
		req.Spec.Env = []string{"B=2", "A=1", "PATH=/bin", "B=3"}
		req.Spec.Ulimits = []sdk.Ulimit{{Name: "nofile", Soft: 100, Hard: 200}}
		req.Spec.SecurityOptions = []string{"no-new-privileges"}
		r.start(req)
		r.exited(req.Attempt)
		me, err := user.LookupId(strconv.Itoa(os.Geteuid()))
		if err != nil {
			r.Fatal(err)
		}
		want := "0022\n/\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n/dev/null\n" + req.Stdout + "\n" + req.Stderr + "\n" +
			"A=1\nB=3\nHOME=" + me.HomeDir + "\nPATH=/bin\n100\nNoNewPrivs:\t1\n"
		if diff := cmp.Diff(want, r.output(req)); diff != "" {
			r.Errorf("-want +got\n%s", diff)
		}
	})
}

func TestUnsupportedIsNamed(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	for want, change := range map[string]func(*sdk.StartRequest){
		"network mode bridge":          func(q *sdk.StartRequest) { q.Network = sdk.NetworkBridge },
		"image":                        func(q *sdk.StartRequest) { q.Spec.Image = "alpine" },
		"hostname":                     func(q *sdk.StartRequest) { q.Spec.Hostname = "h" },
		"mounts":                       func(q *sdk.StartRequest) { q.Spec.Mounts = []sdk.Mount{{Type: "bind", Source: "/", Target: "/x"}} },
		"CDI devices":                  func(q *sdk.StartRequest) { q.Spec.CDIDevices = []string{"nvidia.com/gpu=0"} },
		"hooks":                        func(q *sdk.StartRequest) { q.Spec.Hooks = []sdk.Hook{{Point: "poststop", Path: "/bin/true"}} },
		"device rules":                 func(q *sdk.StartRequest) { q.Spec.DeviceRules = []sdk.DeviceRule{{Type: "c", Major: 189}} },
		"additional groups":            func(q *sdk.StartRequest) { q.Spec.AdditionalGIDs = []uint32{44} },
		"devices":                      func(q *sdk.StartRequest) { q.Spec.Devices = []sdk.HostDevice{{HostPath: "/dev/null"}} },
		"capabilities":                 func(q *sdk.StartRequest) { q.Spec.CapabilitiesAdd = []string{"NET_ADMIN"} },
		"privileged, read-only root":   func(q *sdk.StartRequest) { q.Spec.Privileged, q.Spec.ReadOnlyRoot = true, true },
		"DNS settings":                 func(q *sdk.StartRequest) { q.Spec.DNSSearch = []string{"x"} },
		"extra hosts":                  func(q *sdk.StartRequest) { q.Spec.ExtraHosts = []sdk.HostEntry{{Name: "a", Address: "::1"}} },
		"terminal":                     func(q *sdk.StartRequest) { q.Spec.Terminal = true },
		"open stdin":                   func(q *sdk.StartRequest) { q.Spec.StdinOpen = true },
		"size of /dev/shm":             func(q *sdk.StartRequest) { q.Spec.ShmBytes = 1 },
		"sysctls":                      func(q *sdk.StartRequest) { q.Spec.Sysctls = map[string]string{"a": "b"} },
		"security option apparmor:x":   func(q *sdk.StartRequest) { q.Spec.SecurityOptions = []string{"apparmor:x"} },
		"mapping of host port 81 to 1": func(q *sdk.StartRequest) { q.Spec.Ports = []sdk.PortMapping{{ContainerPort: 1, HostPort: 81}} },
	} {
		req := r.request("main", "exit 0")
		change(&req)
		_, err := r.Start(t.Context(), req)
		if sdk.KindOf(err) != sdk.Unsupported || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is of kind %q: %v", want, sdk.KindOf(err), err)
		}
	}
	if inv, err := r.List(t.Context()); err != nil || len(inv.Containers) > 0 {
		t.Errorf("refused starts left %+v, %v", inv, err)
	}
}

func TestInvalidRequests(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	notAProgram := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(notAProgram, []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte("\x7fELF nonsense"), 0o755); err != nil {
		t.Fatal(err)
	}
	noLoader := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(noLoader, []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		kind   sdk.ErrorKind
		says   string
		change func(*sdk.StartRequest)
	}{
		"relative command":    {sdk.Invalid, "absolute", func(q *sdk.StartRequest) { q.Spec.Command = []string{"sh"} }},
		"no command":          {sdk.Invalid, "absolute", func(q *sdk.StartRequest) { q.Spec.Command = nil }},
		"missing program":     {sdk.NotFound, "/no/such", func(q *sdk.StartRequest) { q.Spec.Command = []string{"/no/such"} }},
		"not executable":      {sdk.Invalid, "mode", func(q *sdk.StartRequest) { q.Spec.Command = []string{notAProgram} }},
		"not a program":       {sdk.Invalid, "no program for this machine", func(q *sdk.StartRequest) { q.Spec.Command = []string{garbage} }},
		"no interpreter":      {sdk.NotFound, "interpreter", func(q *sdk.StartRequest) { q.Spec.Command = []string{noLoader} }},
		"a directory":         {sdk.Invalid, "executed", func(q *sdk.StartRequest) { q.Spec.Command = []string{"/tmp"} }},
		"working directory":   {sdk.Invalid, "/no/dir", func(q *sdk.StartRequest) { q.Spec.WorkingDir = "/no/dir" }},
		"relative directory":  {sdk.Invalid, "absolute", func(q *sdk.StartRequest) { q.Spec.WorkingDir = "x" }},
		"unknown user":        {sdk.Invalid, "nosuchuser", func(q *sdk.StartRequest) { q.Spec.User = "nosuchuser" }},
		"bad environment":     {sdk.Invalid, "NAME=value", func(q *sdk.StartRequest) { q.Spec.Env = []string{"x"} }},
		"bad ulimit":          {sdk.Invalid, "bogus", func(q *sdk.StartRequest) { q.Spec.Ulimits = []sdk.Ulimit{{Name: "bogus"}} }},
		"NUL":                 {sdk.Invalid, "NUL", func(q *sdk.StartRequest) { q.Spec.Env = []string{"A=\x00"} }},
		"task id":             {sdk.Invalid, "hex", func(q *sdk.StartRequest) { q.Attempt.Task = "../../etc" }},
		"container name":      {sdk.Invalid, "letters", func(q *sdk.StartRequest) { q.Attempt.Container = "../x" }},
		"attempt number":      {sdk.Invalid, "number", func(q *sdk.StartRequest) { q.Attempt.Number = 0 }},
		"output file missing": {sdk.Invalid, "open", func(q *sdk.StartRequest) { q.Stdout = "/no/such/file" }},
	} {
		t.Run(name, func(t *testing.T) {
			req := r.request("main", "exit 0")
			tt.change(&req)
			_, err := r.Start(t.Context(), req)
			if sdk.KindOf(err) != tt.kind || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error is of kind %q: %v; want %q saying %q", sdk.KindOf(err), err, tt.kind, tt.says)
			}
		})
	}
	if inv, err := r.List(t.Context()); err != nil || len(inv.Containers) > 0 {
		t.Errorf("refused starts left %+v, %v", inv, err)
	}
}

func TestRefusalShowedTheValueOfAnEnvironmentVariable(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	for _, env := range []string{"TOKEN=hunter2\x00", "=hunter2", "hunter2"} {
		req := r.request("main", "exit 0")
		req.Spec.Env = []string{env}
		_, err := r.Start(t.Context(), req)
		if sdk.KindOf(err) != sdk.Invalid || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("environment entry %q: %v: want it refused and not shown", env, err)
		}
	}
}

func TestStartTookTheFilesFromASupervisorOnItsWay(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	req := r.request("main", "exit 0")
	req.Spec.Command = []string{"/no/such"}
	dir := filepath.Join(r.state, "tasks", req.Attempt.Task, "a", "main", "1")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	meta := `{"mode":"own","boot":"` + strings.TrimSpace(string(boot)) + `"}`
	if err := os.WriteFile(filepath.Join(dir, "meta"), []byte(meta), 0o600); err != nil {
		t.Fatal(err)
	}
	// A supervisor that has not come to its lock yet, made by a plugin that is
	// dead by now.
	slow := exec.Command("/bin/sh", "-c", "sleep 0.3; :", "run", dir)
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { _ = slow.Wait(); close(gone) }()
	if _, err := r.Start(t.Context(), req); sdk.KindOf(err) != sdk.NotFound {
		t.Errorf("Start: %v", err)
	}
	select {
	case <-gone:
	default:
		t.Error("Start did not wait for it")
	}
}

func TestHostPorts(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	req := r.request("main", "exit 0")
	req.Spec.Ports = []sdk.PortMapping{{Protocol: "tcp", ContainerPort: port}}
	if _, err := r.Start(t.Context(), req); !errors.Is(err, sdk.Conflict) || !strings.Contains(err.Error(), strconv.Itoa(port)) {
		t.Errorf("Start with port %d taken: %v, want a conflict naming it", port, err)
	}
	l.Close()
	c := r.start(req)
	want := []sdk.PortMapping{{Protocol: "tcp", ContainerPort: port, HostPort: port}}
	if diff := cmp.Diff(want, c.Ports); diff != "" {
		t.Errorf("ports: %s", diff)
	}
}

func TestExitIsHintedAtWithin100Milliseconds(t *testing.T) {
	bothModes(t, func(r *rig) {
		req := r.request("main", "while :; do sleep 0.1; done")
		c := r.start(req)
		r.relaunch() // it need not be the process that started it
		hint := r.listen()
		begun := time.Now()
		if err := syscall.Kill(c.PID, syscall.SIGKILL); err != nil {
			r.Fatal(err)
		}
		hint(req.Attempt)
		took := time.Since(begun)
		r.Logf("hinted at after %s", took)
		if got := r.find(req.Attempt); code(got) != "137" {
			r.Errorf("exit is %s, want 137", code(got))
		}
		if took > slow(time.Second) { // 100 ms on a machine that is not shared
			r.Errorf("it took %s", took)
		}
	})
}

// A supervisor lives as long as its task: 1 MB a task is the budget.
func TestSupervisorMemory(t *testing.T) {
	r := newRig(t, process.ModeOwn)
	const tasks = 8
	var pss, rss int
	for i := range tasks {
		req := r.request("m"+strconv.Itoa(i), "exec sleep 600")
		pid := supervisorOf(t, r.start(req).PID)
		defer func() {
			raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
			if err != nil {
				t.Skipf("cannot measure: %v", err)
			}
			pss += kilobytes(string(raw), "Pss:")
			rss += kilobytes(string(raw), "Rss:")
			if i == 0 { // deferred calls run last to first
				t.Logf("%d supervisors: %d KB PSS and %d KB RSS each", tasks, pss/tasks, rss/tasks)
				if pss/tasks > 1024 {
					t.Errorf("%d KB PSS each, more than 1 MB", pss/tasks)
				}
			}
		}()
	}
}

// TestHugePagesAreTheProgramsOwnBusiness: a supervisor keeps out of them, its
// program and a command in it have what everybody has.
func TestHugePagesAreTheProgramsOwnBusiness(t *testing.T) {
	const field = "THP_enabled:"
	bothModes(t, func(r *rig) {
		if b, _ := os.ReadFile("/proc/self/status"); !strings.Contains(string(b), field) {
			r.Skip("this kernel does not tell: it is older than 5.0")
		}
		req := r.request("main", "grep "+field+" /proc/self/status; exec sleep 600")
		c := r.start(req)
		if r.mode == process.ModeOwn { // else systemd itself is the parent
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", supervisorOf(r.T, c.PID)))
			if err != nil || !strings.Contains(string(b), field+"\t0") {
				r.Errorf("the supervisor's huge pages are not off, %v", err)
			}
		}
		res, err := r.Exec(r.Context(), sdk.ExecRequest{Attempt: req.Attempt, Command: []string{"/bin/grep", field, "/proc/self/status"}, Timeout: 10 * time.Second})
		if err != nil || string(res.Output) != field+"\t1\n" {
			r.Errorf("a command in it sees %q, %v", res.Output, err)
		}
		if out, err := os.ReadFile(req.Stdout); err != nil || string(out) != field+"\t1\n" {
			r.Errorf("the program sees %q, %v", out, err)
		}
	})
}

func kilobytes(smaps, key string) int {
	for line := range strings.Lines(smaps) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == key {
			n, _ := strconv.Atoi(f[1])
			return n
		}
	}
	return 0
}
