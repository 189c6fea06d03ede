package blackbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// refused runs a command that must fail, and checks what it says.
func refused(t *testing.T, cli *rig.CLI, stdin string, wantCode int, want []string, args ...string) {
	t.Helper()
	out, err := cli.Pipe(deadline(t, patience), []byte(stdin), args...)
	var e *rig.ExitError
	if !errors.As(err, &e) {
		t.Fatalf("belay %s: want a failure, got %v and %s", strings.Join(args, " "), err, out)
	}
	t.Logf("exit %d: %s", e.Code, strings.TrimSpace(e.Stderr))
	if wantCode != 0 && e.Code != wantCode {
		t.Errorf("exit %d, want %d", e.Code, wantCode)
	}
	for _, w := range want {
		if !strings.Contains(e.Stderr, w) {
			t.Errorf("no word of %q", w)
		}
	}
	if strings.Contains(e.Stderr, "panic") || strings.Contains(e.Stderr, "goroutine ") {
		t.Error("that is a stack trace, not a message")
	}
}

func TestBadTaskDefinitions(t *testing.T) {
	c := newControl(t)
	for _, r := range []struct {
		name, doc string
		want      []string
	}{
		{"malformed", "{\"family\": \"x\",\n \"containerDefinitions\": [}", []string{"line 2"}},
		{"empty", "", []string{"empty"}},
		{"unknown field", `{"family":"x","containerDefinitions":[{"name":"a","image":"i","memory":64,"imagee":"j"}]}`, []string{"containerDefinitions[0]", "imagee"}},
		{"wrong case", `{"Family":"x","containerDefinitions":[{"name":"a","image":"i","memory":64}]}`, []string{"Family", "family"}},
		{"several at once", `{"family":"x y","networkMode":"awsvpc","containerDefinitions":[{"name":"a","memory":64,"portMappings":[{"containerPort":70000}]}]}`,
			[]string{"family", "awsvpc", "image", "70000"}},
		{"secrets", `{"family":"x","containerDefinitions":[{"name":"a","image":"i","memory":64,"secrets":[{"name":"A","valueFrom":"b"}]}]}`, []string{"secrets"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			refused(t, c.CLI(), r.doc, 0, r.want, "taskdef", "register", "-f", "-")
		})
	}
	var l struct {
		TaskDefinitions []any
	}
	if err := c.CLI().JSON(deadline(t, patience), &l, "taskdef", "list"); err != nil || len(l.TaskDefinitions) != 0 {
		t.Errorf("half done: %v, %v", l.TaskDefinitions, err)
	}
}

func TestBadConnections(t *testing.T) {
	c := newControl(t)
	port, err := rig.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	with := func(env ...string) *rig.CLI {
		cli := c.CLI()
		cli.Env = append(cli.Env, env...)
		return cli
	}
	t.Run("nobody listens", func(t *testing.T) {
		refused(t, with(fmt.Sprintf("BELAY_ADDR=127.0.0.1:%d", port)), "", 1, []string{"belay-control"}, "cluster", "list")
	})
	t.Run("not an address", func(t *testing.T) {
		refused(t, with("BELAY_ADDR=no such place"), "", 0, []string{"no such place"}, "cluster", "list")
	})
	t.Run("wrong token", func(t *testing.T) {
		refused(t, with("BELAY_TOKEN=wrong"), "", 1, []string{"token"}, "cluster", "list")
	})
	t.Run("wrong CA", func(t *testing.T) {
		other := newControl(t)
		refused(t, with("BELAY_CA="+filepath.Join(other.Dir, "ca.pem")), "", 1, []string{"ca.pem"}, "cluster", "list")
	})
	t.Run("agent enrols at what is no control plane", func(t *testing.T) {
		code, err := c.CLI().Activate(deadline(t, patience), cluster, 1)
		if err != nil {
			t.Fatal(err)
		}
		c.Stop(15 * time.Second)
		out, rc := enroll(t, filepath.Join(tempDir(t), "s"), code)
		t.Logf("exit %d: %s", rc, out)
		if rc == 0 || !strings.Contains(out, c.Addr) {
			t.Errorf("exit %d without naming %s", rc, c.Addr)
		}
		if err := c.Restart(deadline(t, patience)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("second control plane on the same data", func(t *testing.T) {
		out, err := exec.CommandContext(deadline(t, patience), bin(t).Path("belay-control"), "serve", "--data-dir", c.Dir, "--listen", fmt.Sprintf("127.0.0.1:%d", port)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.Dir) {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("port taken", func(t *testing.T) {
		out, err := exec.CommandContext(deadline(t, patience), bin(t).Path("belay-control"), "serve", "--data-dir", filepath.Join(tempDir(t), "d"), "--listen", c.Addr).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "in use") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func TestBadDevices(t *testing.T) {
	s := newSite(t, "process")
	agent := func(args ...string) (string, int) {
		out, err := exec.CommandContext(deadline(t, patience), bin(t).Path("belay-agent"), args...).CombinedOutput()
		t.Logf("%s", out)
		return string(out), exitCode(err)
	}
	t.Run("second agent on the same state", func(t *testing.T) {
		out, rc := agent("run", "--state-dir", s.agent.State, "--run-dir", filepath.Join(s.dir, "run2"), "--plugin-dir", s.agent.PluginDir)
		if rc == 0 || !strings.Contains(out, fmt.Sprint(s.agent.PID())) {
			t.Errorf("exit %d, and the other agent's pid %d is not named", rc, s.agent.PID())
		}
	})
	t.Run("never enrolled", func(t *testing.T) {
		out, rc := agent("run", "--state-dir", filepath.Join(s.dir, "new"), "--run-dir", filepath.Join(s.dir, "run3"), "--plugin-dir", s.agent.PluginDir)
		if rc == 0 || !strings.Contains(out, "enroll") {
			t.Errorf("exit %d", rc)
		}
	})
	t.Run("unknown configuration key", func(t *testing.T) {
		file := filepath.Join(s.dir, "agent.toml")
		if err := os.WriteFile(file, []byte("log_level = \"info\"\nstate_dri = \"/tmp\"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		out, rc := agent("run", "--config", file, "--state-dir", filepath.Join(s.dir, "new"), "--run-dir", filepath.Join(s.dir, "run4"))
		if rc == 0 || !strings.Contains(out, "state_dri") {
			t.Errorf("exit %d", rc)
		}
	})
}

// TestBadPlugins: each is reported by name with what is wrong, and harms no other.
func TestBadPlugins(t *testing.T) {
	dir := tempDir(t)
	c := newControl(t)
	plugins := filepath.Join(dir, "plugins")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	link(t, bin(t).Path("belay-plugins"), filepath.Join(plugins, "process"))
	put := func(name, text string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(plugins, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	put("not-executable", "#!/bin/sh\nexit 0\n", 0o644)
	put("text", "I am a text file.\n", 0o755)
	put("exits", "#!/bin/sh\necho cannot find my hardware >&2\nexit 3\n", 0o755)
	put("other-version", "#!/bin/sh\necho '1|99|unix|/nowhere|grpc|'\nsleep 600\n", 0o755)
	a := newDevice(t, c.CLI(), dir, func(a *rig.Agent) { a.PluginDir = plugins })
	want := map[string]string{"not-executable": "executable", "text": "", "exits": "cannot find my hardware", "other-version": "99"}
	type plugin struct{ Name, State, LastError string }
	var l struct {
		Instances []struct{ Plugins []plugin }
	}
	if err := rig.Until(deadline(t, patience), a.Process, "the bad plugins to be reported", func() error {
		if err := c.CLI().JSON(deadline(t, patience), &l, "instance", "list", "--cluster", cluster); err != nil {
			return err
		}
		if len(l.Instances) != 1 {
			return fmt.Errorf("%d instances", len(l.Instances))
		}
		seen := map[string]plugin{}
		for _, p := range l.Instances[0].Plugins {
			seen[p.Name] = p
		}
		for name, words := range want {
			p, ok := seen[name]
			if !ok || p.LastError == "" || p.State == "ready" || !strings.Contains(p.LastError, words) {
				return fmt.Errorf("%s is %+v", name, p)
			}
		}
		if seen["process"].State != "ready" {
			return fmt.Errorf("the good one suffers: %+v", seen["process"])
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	b, _ := json.MarshalIndent(l, "", " ")
	t.Logf("%s", b)
}

func link(t *testing.T, from, to string) {
	t.Helper()
	abs, err := filepath.Abs(from)
	if err == nil {
		err = os.Symlink(abs, to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestBadPlacement: what does not fit is refused with numbers, nothing is left.
func TestBadPlacement(t *testing.T) {
	s := newSite(t, "process")
	register := func(family string, doc string) {
		t.Helper()
		if _, err := s.cli.Pipe(deadline(t, patience), []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	register("huge", `{"family":"huge","belay":{"runtime":"process"},"memory":"4000000","containerDefinitions":[{"name":"c","command":["/bin/sleep","600"]}]}`)
	register("port", `{"family":"port","belay":{"runtime":"process"},"containerDefinitions":[{"name":"c","command":["/bin/sleep","600"],"portMappings":[{"containerPort":18080,"hostPort":18080}]}]}`)
	register("where", `{"family":"where","belay":{"runtime":"nowhere"},"containerDefinitions":[{"name":"c","image":"i","memory":64,"command":["/bin/sleep","600"]}]}`)
	run := func(family string) []string {
		return []string{"task", "run", "--cluster", cluster, "--taskdef", family}
	}
	refused(t, s.cli, "", 0, []string{"RESOURCE:MEMORY", "4000000"}, run("huge")...)
	refused(t, s.cli, "", 0, []string{"nowhere"}, run("where")...)
	refused(t, s.cli, "", 0, []string{"no-such"}, run("no-such")...)
	refused(t, s.cli, "", 0, []string{"no-such-cluster"}, "task", "run", "--cluster", "no-such-cluster", "--taskdef", "port")
	refused(t, s.cli, "", 0, []string{"cluster default has no instances", "in " + cluster, "--cluster"}, "task", "run", "--taskdef", "port")
	if _, err := s.cli.Run(deadline(t, patience), run("port")...); err != nil {
		t.Fatal(err)
	}
	refused(t, s.cli, "", 0, []string{"RESOURCE:PORTS", "18080"}, run("port")...)
	var l struct{ Tasks []rig.Task }
	if err := s.cli.JSON(deadline(t, patience), &l, "task", "list", "--cluster", cluster, "--all"); err != nil || len(l.Tasks) != 1 {
		t.Errorf("%d tasks are left of one placed, %v", len(l.Tasks), err)
	}
}

// TestRetriedCreate: a client that lost the answer asks again with its token.
func TestRetriedCreate(t *testing.T) {
	s := newSite(t, "process")
	ctx := deadline(t, patience)
	doc := s.document(t, "once", container{"name": "c", "script": "while :; do sleep 0.1; done"})
	var first, second struct{ Tasks []rig.Task }
	if _, err := s.cli.Pipe(ctx, []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	args := []string{"task", "run", "--cluster", cluster, "--taskdef", "once", "--client-token", "token-1"}
	if err := s.cli.JSON(ctx, &first, args...); err != nil {
		t.Fatal(err)
	}
	s.Control.Kill()
	if err := s.Control.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.cli.JSON(ctx, &second, args...); err != nil {
		t.Fatal(err)
	}
	if len(first.Tasks) != 1 || len(second.Tasks) != 1 || first.Tasks[0].ID != second.Tasks[0].ID {
		t.Errorf("the retry made another task: %+v, %+v", first, second)
	}
	refused(t, s.cli, "", 0, []string{"token"}, append(args, "--count", "2")...)
}

// TestFullDisk: with no room under the state directory nothing new starts,
// what runs goes on, and when there is room again so does the rest.
func TestFullDisk(t *testing.T) {
	dir := tempDir(t)
	state := filepath.Join(dir, "state")
	smallDisk(t, state, "4m")
	s := &site{Control: newControl(t), runtime: "process", dir: dir}
	s.cli = s.Control.CLI()
	s.agent = newDevice(t, s.cli, dir, func(*rig.Agent) {})
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process")
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	before := s.run(t, "before", container{"name": "c", "script": "while :; do sleep 0.1; done"})
	balloon := filepath.Join(state, "balloon")
	fill(t, balloon)
	ctx := deadline(t, 2*patience)
	id, err := s.cli.RunTask(ctx, cluster, s.document(t, "full", container{"name": "c", "script": "while :; do sleep 0.1; done"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := rig.Until(ctx, s.agent.Process, "the agent to say the disk is full", func() error {
		if !strings.Contains(s.agent.Tail(20000), "no space left") {
			return errors.New("not in its log yet")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if now, err := s.cli.Describe(ctx, before.ID); err != nil || now.Container("c").PID != before.Container("c").PID || !alive(before.Container("c").PID) {
		t.Errorf("what ran before: %+v, %v", now, err)
	}
	if now, err := s.cli.Describe(ctx, id); err != nil || running(now) {
		t.Errorf("a task was started that could not be persisted: %+v, %v", now, err)
	}
	if err := os.Remove(balloon); err != nil {
		t.Fatal(err)
	}
	s.await(t, id, "the task to run once there is room", patience, running)
	s.sweep(t)
}

// smallDisk makes a directory with little room, mounted until the test ends.
func smallDisk(t *testing.T, dir, size string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill writes a file until the file system is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
