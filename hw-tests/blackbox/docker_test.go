package blackbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// atLength is set by make test-docker: what waits, waits as long as promised.
func atLength() bool { return os.Getenv("BELAY_TEST_DOCKER") != "" }

// newDockerSite is a site with a Docker daemon of its own.
func newDockerSite(t *testing.T, o rig.DockerOptions, before func(*rig.Docker)) (*site, *rig.Docker) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("docker needs root: run as root to test it")
	}
	d, err := rig.StartDocker(deadline(t, patience), filepath.Join(tempDir(t), "d"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if b, err := os.ReadFile(d.Log()); err == nil {
				t.Logf("the Docker daemon's last words:\n%s", b[max(0, len(b)-6000):])
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	if before != nil {
		before(d)
	}
	return newSiteOf(t, "docker", func(s *site, a *rig.Agent) { dockerConfig(t, a, s.dir, d.Address) }), d
}

// pluginLine is one plugin as `belay-agent plugins -o json` prints it.
type pluginLine struct {
	Name, State, LastError, Checksum, Version string
	PID, Restarts                             int
}

func plugins(t testing.TB, s *site) map[string]pluginLine {
	t.Helper()
	out, err := exec.CommandContext(deadline(t, patience), s.agent.Bin.Path("belay-agent"), "plugins", "--run-dir", s.agent.RunDir, "-o", "json").Output()
	if err != nil {
		t.Fatalf("belay-agent plugins: %v", err)
	}
	var l struct{ Plugins []pluginLine }
	if err := json.Unmarshal(out, &l); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	by := map[string]pluginLine{}
	for _, p := range l.Plugins {
		by[p.Name] = p
	}
	return by
}

// pluginSays waits until a plugin is as it should be.
func pluginSays(t testing.TB, s *site, name, what string, ok func(pluginLine) bool) pluginLine {
	t.Helper()
	var p pluginLine
	if err := rig.Until(deadline(t, patience), nil, what, func() error {
		if p = plugins(t, s)[name]; !ok(p) {
			return fmt.Errorf("plugin is %+v", p)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	return p
}

// down says that the daemon is away, naming its socket.
func down(d *rig.Docker) func(pluginLine) bool {
	return func(p pluginLine) bool { return p.State == "ready" && strings.Contains(p.LastError, d.Address) }
}

func sound(p pluginLine) bool { return p.State == "ready" && p.LastError == "" }

// counting writes one number a line until it is let go, and exits 7.
func counting(dir, name string) string {
	p := filepath.Join(dir, name)
	return fmt.Sprintf("trap 'exit 143' TERM; echo started >> %s.starts; n=0; while [ ! -e %s.go ]; do n=$((n+1)); echo $n; sleep 0.1; done; exit 7", p, p)
}

// counted checks that the output of a task that counted has every number once.
func counted(t *testing.T, s *site, id string) {
	t.Helper()
	out, err := s.cli.Run(deadline(t, patience), "logs", id, "--container", "c")
	if err != nil {
		t.Error(err)
		return
	}
	lines := strings.Fields(string(out))
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			t.Errorf("line %d of the output is %q", i+1, l)
			return
		}
	}
	if len(lines) < 10 {
		t.Errorf("the output has only %d lines", len(lines))
	}
	t.Logf("all of %d lines of output are there", len(lines))
}

// TestDocker is what a daemon that lets containers live can do to an agent.
func TestDocker(t *testing.T) {
	s, d := newDockerSite(t, rig.DockerOptions{LiveRestore: true}, func(d *rig.Docker) {
		if err := d.Stop(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("comes later", func(t *testing.T) { dockerComesLater(t, s, d) })
	t.Run("crashes", func(t *testing.T) { dockerRestarts(t, s, d, "crashes", func() error { d.Kill(); return nil }) })
	if atLength() {
		t.Run("is stopped", func(t *testing.T) { dockerRestarts(t, s, d, "stopped", d.Stop) })
	}
	t.Run("hangs", func(t *testing.T) { dockerHangs(t, s, d) })
}

// dockerComesLater: a daemon that is not there when the agent starts is
// said to be missing, its device no candidate; both end when it comes.
func dockerComesLater(t *testing.T, s *site, d *rig.Docker) {
	p := pluginSays(t, s, "docker", "the plugin to say that the daemon is away", down(d))
	t.Log(p.LastError)
	var l struct{ Plugins []pluginLine }
	if err := s.cli.JSON(deadline(t, patience), &l, "plugin", "list", "--instance", s.instance); err != nil {
		t.Fatal(err)
	}
	for _, p := range l.Plugins {
		if p.Name == "docker" && !down(d)(p) {
			t.Errorf("the control plane shows %+v", p)
		}
	}
	doc := s.document(t, "late", container{"name": "c", "script": waitScript(s.dir, "late")})
	if id, err := s.cli.RunTask(deadline(t, patience), cluster, doc); err == nil {
		t.Errorf("a device without Docker was a candidate: task %s", id)
	} else if !strings.Contains(err.Error(), `"docker" is up, but what it works with is not there`) {
		t.Error(err)
	}
	if err := d.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	var id string
	if err := rig.Until(deadline(t, patience), nil, "the task to be placed", func() (err error) {
		id, err = s.cli.RunTask(deadline(t, patience), cluster, doc)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s.await(t, id, "the task to run", patience, running)
	release(t, s.dir, "late")
	exits(t, s, id, 7)
	pluginSays(t, s, "docker", "the plugin to have nothing to say", sound)
}

// dockerRestarts: containers and their tasks go on as if nothing had been,
// whichever way the daemon ends.
func dockerRestarts(t *testing.T, s *site, d *rig.Docker, file string, end func() error) {
	before := s.run(t, "live-"+file, container{"name": "c", "script": counting(s.dir, file)})
	pid := before.Container("c").PID
	if err := end(); err != nil {
		t.Fatal(err)
	}
	pluginSays(t, s, "docker", "the plugin to say that the daemon is away", down(d))
	now := s.await(t, before.ID, "the task to say what it waits for", patience, func(now rig.Task) bool { return strings.Contains(now.Note, d.Address) })
	if !running(now) || !alive(pid) {
		t.Errorf("the task is %s, its process lives: %v", now.LastStatus, alive(pid))
	}
	// What is asked for meanwhile is done when the daemon is back.
	id, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "later-"+file, container{"name": "c", "script": waitScript(s.dir, "later-"+file)}), "--instance", s.instance)
	if err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	if err := d.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	s.await(t, id, "what was asked for meanwhile to run", patience, running)
	after := s.await(t, before.ID, "the task to be as before", patience, func(now rig.Task) bool { return running(now) && now.Note == "" })
	t.Logf("as before %s after the daemon was started", time.Since(back).Round(time.Millisecond))
	if c := after.Container("c"); c.PID != pid || c.Attempt != 1 || !alive(pid) {
		t.Errorf("pid %d attempt %d alive %v after, pid %d before", c.PID, c.Attempt, alive(pid), pid)
	}
	release(t, s.dir, file)
	release(t, s.dir, "later-"+file)
	for _, f := range []string{file, "later-" + file} {
		if n := starts(t, s.dir, f); n != 1 {
			t.Errorf("%s was started %d times", f, n)
		}
	}
	exits(t, s, before.ID, 7)
	exits(t, s, id, 7)
	counted(t, s, before.ID)
	if p := pluginSays(t, s, "docker", "the plugin to have nothing to say", sound); p.Restarts != 0 {
		t.Errorf("the plugin was restarted: %+v", p)
	}
}

// dockerHangs: a daemon that does not answer holds up nobody but who
// needs it, and they go on when it does.
func dockerHangs(t *testing.T, s *site, d *rig.Docker) {
	held := container{"name": "c", "script": counting(s.dir, "held"),
		"healthCheck": map[string]any{"command": []any{"CMD-SHELL", "true"}, "interval": 5, "timeout": 2, "retries": 1}}
	before := s.run(t, "held", held)
	plugin := plugins(t, s)["docker"]
	if err := d.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer d.Signal(syscall.SIGCONT)
	hang := 3 * time.Second
	if atLength() {
		hang = 35 * time.Second
	}
	until := time.Now().Add(hang)
	id, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "waits", container{"name": "c", "script": waitScript(s.dir, "waits")}))
	if err != nil {
		t.Fatal(err)
	}
	beside := &site{Control: s.Control, cli: s.cli, agent: s.agent, instance: s.instance, runtime: "process", dir: s.dir}
	begun := time.Now()
	other := beside.run(t, "beside", container{"name": "c", "script": waitScript(s.dir, "beside")})
	t.Logf("a task of another runtime ran after %s", time.Since(begun).Round(time.Millisecond))
	if took := time.Since(begun); took > backWithin {
		t.Errorf("a task of another runtime took %s", took)
	}
	release(t, s.dir, "beside")
	exits(t, beside, other.ID, 7)
	if p := plugins(t, s)["process"]; p.Restarts != 0 || p.State != "ready" {
		t.Errorf("the plugin process: %+v", p)
	}
	moment(time.Until(until))
	if now, err := s.cli.Describe(deadline(t, patience), before.ID); err != nil || !running(now) || now.HealthStatus == "UNHEALTHY" {
		t.Errorf("what ran before: %+v, %v", now, err)
	}
	if err := d.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.await(t, id, "what was asked for meanwhile to run", patience, running)
	after := s.await(t, before.ID, "the task to be as before", patience, func(now rig.Task) bool { return running(now) && now.Note == "" })
	if c := after.Container("c"); c.PID != before.Container("c").PID || c.Attempt != 1 {
		t.Errorf("%+v", after)
	}
	release(t, s.dir, "held")
	release(t, s.dir, "waits")
	exits(t, s, before.ID, 7)
	exits(t, s, id, 7)
	counted(t, s, before.ID)
	if n := starts(t, s.dir, "waits"); n != 1 {
		t.Errorf("what was asked for meanwhile was started %d times", n)
	}
	if p := plugins(t, s)["docker"]; p.PID != plugin.PID {
		t.Errorf("the plugin was restarted: %+v, before %+v", p, plugin)
	}
}

// TestDockerTakesContainersAlong: where containers end with the daemon, that
// is an exit like any other: seen once, and followed by what the task's
// restart policy says.
func TestDockerTakesContainersAlong(t *testing.T) {
	if !atLength() {
		t.Skip("takes minutes: run make test-docker")
	}
	s, d := newDockerSite(t, rig.DockerOptions{}, nil)
	for name, end := range map[string]func() error{"crashes": func() error { d.Kill(); return nil }, "is stopped": d.Stop} {
		t.Run(name, func(t *testing.T) {
			file := strings.ReplaceAll(name, " ", "-")
			once := s.run(t, "once-"+file, container{"name": "c", "script": waitScript(s.dir, "once-"+file)})
			again := s.run(t, "again-"+file, container{"name": "c", "script": waitScript(s.dir, "again-"+file), "restartPolicy": map[string]any{"enabled": true, "restartAttemptPeriod": 60}})
			moment(61 * time.Second) // one that ran for less is not restarted
			if err := end(); err != nil {
				t.Fatal(err)
			}
			if err := d.Restart(deadline(t, patience)); err != nil {
				t.Fatal(err)
			}
			stop := s.await(t, once.ID, "the task to end with the daemon", patience, stopped)
			if c := stop.Container("c"); c.ExitCode == nil || c.Attempt != 1 || stop.StopCode != "EssentialContainerExited" {
				t.Errorf("%+v", stop)
			} else {
				t.Logf("it exited with %d: %s", *c.ExitCode, stop.StoppedReason)
			}
			now := s.await(t, again.ID, "the task to be restarted", patience, func(now rig.Task) bool {
				return stopped(now) || running(now) && now.Container("c").Attempt == 2 && now.Container("c").LastStatus == "RUNNING"
			})
			release(t, s.dir, "again-"+file)
			if !running(now) || !alive(now.Container("c").PID) {
				t.Errorf("%+v", now)
			}
			exits(t, s, again.ID, 7)
			for f, want := range map[string]int{"once-" + file: 1, "again-" + file: 2} {
				if n := starts(t, s.dir, f); n != want {
					t.Errorf("%s was started %d times, want %d", f, n, want)
				}
			}
			// The device is as good as new.
			next := s.run(t, "next-"+file, container{"name": "c", "script": waitScript(s.dir, "next-"+file)})
			release(t, s.dir, "next-"+file)
			exits(t, s, next.ID, 7)
		})
	}
}

// BenchmarkDockerMemory prints what the docker plugin and the process that
// copies output hold, with containers that write a line ten times a second.
func BenchmarkDockerMemory(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("docker needs root: run as root")
	}
	for b.Loop() {
		s := newSite(b, "docker")
		held := func(name string) (m mem) {
			found, err := filepath.Glob("/proc/[0-9]*/cmdline")
			if err != nil {
				b.Fatal(err)
			}
			for _, f := range found {
				line, err := os.ReadFile(f)
				if err != nil || !strings.HasPrefix(string(line), name+"\x00") || !strings.Contains(string(line), host(b).dockerd(b).Address) {
					continue
				}
				pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
				if err != nil {
					b.Fatal(err)
				}
				m = m.plus(memory(b, pid))
			}
			return m
		}
		plugin := func() mem { return memory(b, pluginSays(b, s, "docker", "the plugin to be up", sound).PID) }
		fmt.Printf("\ncontainers, KiB   belay-docker-output: PSS  of it anonymous   plugin docker: PSS  of it anonymous\n")
		ran := 0
		for _, n := range []int{0, 1, 10, 20} {
			for ; ran < n; ran++ {
				s.run(b, fmt.Sprintf("c%d", ran), container{"name": "c", "script": counting(s.dir, fmt.Sprint(ran)), "stopTimeout": 2})
			}
			moment(15 * time.Second)
			o, p := held("belay-docker-output"), plugin()
			fmt.Printf("  %-10d %25d  %15d %21d  %15d\n", n, o.pss, o.anon, p.pss, p.anon)
		}
	}
}
