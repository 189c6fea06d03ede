package blackbox

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// TestFirstTask is the black box, step by step, on each runtime.
func TestFirstTask(t *testing.T) {
	eachRuntime(t, func(t *testing.T, rt string) {
		s := newSite(t, rt)
		task := s.run(t, "two",
			container{"name": "web", "script": "echo out-web; echo err-web >&2; trap 'exit 3' TERM; while :; do sleep 0.1; done", "essential": true},
			container{"name": "side", "script": "echo out-side; while :; do sleep 0.1; done", "essential": false, "stopTimeout": 2},
		)
		digest := regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
		for _, name := range []string{"web", "side"} {
			c := task.Container(name)
			if c.LastStatus != "RUNNING" || c.PID == 0 || c.RuntimeID == "" || c.ExitCode != nil {
				t.Errorf("container %s: %+v", name, c)
			}
			if s.images() && !digest.MatchString(c.ImageDigest) {
				t.Errorf("container %s has image digest %q", name, c.ImageDigest)
			}
		}
		if task.Instance != s.instance || task.DesiredStatus != "RUNNING" {
			t.Errorf("instance %q desired %q", task.Instance, task.DesiredStatus)
		}
		ctx := deadline(t, patience)
		for _, c := range []string{"web", "side"} {
			if err := rig.Until(ctx, nil, "the output of "+c, func() error {
				out, err := s.cli.Run(ctx, "logs", task.ID, "--container", c)
				if err != nil {
					return err
				}
				if !strings.Contains(string(out), "out-"+c) {
					return fmt.Errorf("logs print %q", out)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		}
		if _, err := s.cli.Run(ctx, "task", "stop", task.ID, "--reason", "seen enough"); err != nil {
			t.Fatal(err)
		}
		end := s.await(t, task.ID, "the task to stop", patience, stopped)
		if c := end.Container("web"); c.ExitCode == nil || *c.ExitCode != 3 {
			t.Errorf("web caught SIGTERM and exited 3, reported: %+v", c)
		}
		// A shell that is PID 1 ignores SIGTERM, one that is not dies of it.
		want := map[string]int{"containerd": 137, "docker": 137, "process": 143}[rt]
		if c := end.Container("side"); c.ExitCode == nil || *c.ExitCode != want {
			t.Errorf("side should have exited %d, reported: %+v", want, c)
		}
		if end.StopCode != "UserInitiated" || !strings.Contains(end.StoppedReason, "seen enough") {
			t.Errorf("stop code %q, reason %q", end.StopCode, end.StoppedReason)
		}
		out, err := s.cli.Run(ctx, "logs", task.ID, "--container", "web")
		if err != nil || !strings.Contains(string(out), "out-web") {
			t.Errorf("logs of the stopped task: %q, %v", out, err)
		}
	})
}

func TestInstanceDescribe(t *testing.T) {
	s := newSite(t, "process")
	var i struct {
		ID, Status   string
		Connected    bool
		AgentVersion string
		Attributes   []struct{ Name, Value string }
		Resources    struct {
			Registered, Remaining struct{ CPU, Memory int }
		}
		Plugins []struct{ Name, Version, State string }
	}
	if err := s.cli.JSON(deadline(t, patience), &i, "instance", "describe", s.instance[:8]); err != nil {
		t.Fatal(err)
	}
	attr := map[string]string{}
	for _, a := range i.Attributes {
		attr[a.Name] = a.Value
	}
	if !strings.HasPrefix(attr["belay.arch"], runtime.GOARCH) || attr["belay.kernel"] == "" || attr["belay.cpus"] != fmt.Sprint(runtime.NumCPU()) || attr["belay.memory_mib"] == "" {
		t.Errorf("attributes %v", attr)
	}
	if i.ID != s.instance || i.Status != "ACTIVE" || !i.Connected || i.AgentVersion == "" || i.Resources.Registered.CPU < 512 || i.Resources.Registered.Memory < 64 {
		t.Errorf("instance %+v", i)
	}
	found := false
	for _, p := range i.Plugins {
		found = found || p.Name == "process" && p.Version != "" && p.State == "ready"
	}
	if !found {
		t.Errorf("plugins %+v", i.Plugins)
	}
}

// TestTaskRunWait: the exit code of the command is the container's.
func TestTaskRunWait(t *testing.T) {
	eachRuntime(t, func(t *testing.T, rt string) {
		s := newSite(t, rt)
		ctx := deadline(t, patience)
		for _, code := range []int{0, 42} {
			doc := s.document(t, fmt.Sprintf("code%d", code), container{"name": "c", "script": fmt.Sprintf("exit %d", code)})
			file := filepath.Join(s.dir, "taskdef.json")
			if err := os.WriteFile(file, []byte(doc), 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := s.cli.Run(ctx, "taskdef", "register", "-f", file); err != nil {
				t.Fatal(err)
			}
			_, err := s.cli.Run(ctx, "task", "run", "--cluster", cluster, "--taskdef", fmt.Sprintf("code%d", code), "--wait")
			if got := exitCode(err); got != code {
				t.Errorf("task run --wait ended with %d, the container with %d: %v", got, code, err)
			}
		}
	})
}

// TestDependencies: an init container that must succeed, a health check that
// must pass, and an order that follows from them.
func TestDependencies(t *testing.T) {
	eachRuntime(t, func(t *testing.T, rt string) {
		s := newSite(t, rt)
		order := filepath.Join(s.dir, "order")
		say := func(w string) string { return fmt.Sprintf("echo %s >> %s; ", w, order) }
		task := s.run(t, "deps",
			container{"name": "init", "script": say("init") + "exit 0", "essential": false},
			container{"name": "db", "script": say("db") + fmt.Sprintf("sleep 1; touch %s.healthy; while :; do sleep 0.1; done", order), "stopTimeout": 2,
				"dependsOn":   []any{map[string]any{"containerName": "init", "condition": "SUCCESS"}},
				"healthCheck": map[string]any{"command": []any{"CMD-SHELL", "test -e " + order + ".healthy"}, "interval": 5, "timeout": 2, "retries": 3, "startPeriod": 5}},
			container{"name": "app", "script": say("app") + "while :; do sleep 0.1; done", "stopTimeout": 2,
				"dependsOn": []any{map[string]any{"containerName": "db", "condition": "HEALTHY"}}},
		)
		if err := rig.Until(deadline(t, patience), nil, "the app to write", func() error {
			b, err := os.ReadFile(order)
			if err != nil || string(b) != "init\ndb\napp\n" {
				return fmt.Errorf("order is %q, %v", b, err)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if c := task.Container("init"); c.ExitCode == nil || *c.ExitCode != 0 {
			t.Errorf("init: %+v", c)
		}
		if c := task.Container("db"); c.HealthStatus != "HEALTHY" {
			t.Errorf("db: %+v", c)
		}
	})
}

// TestRestartPolicy: attempts live below the task, which stays RUNNING.
func TestRestartPolicy(t *testing.T) {
	eachRuntime(t, func(t *testing.T, rt string) {
		s := newSite(t, rt)
		task := s.run(t, "again",
			container{"name": "c", "script": "while :; do sleep 0.1; done", "stopTimeout": 2},
			container{"name": "flaky", "essential": false, "script": "sleep 1; exit 9",
				"restartPolicy": map[string]any{"enabled": true, "restartAttemptPeriod": 60}})
		// A run shorter than the attempt period is not restarted (ECS).
		end := s.await(t, task.ID, "flaky to exit", patience, func(t rig.Task) bool { return t.Container("flaky").LastStatus == "STOPPED" })
		if c := end.Container("flaky"); c.ExitCode == nil || *c.ExitCode != 9 || c.Attempt != 1 {
			t.Errorf("flaky: %+v", c)
		}
		if !running(end) {
			t.Errorf("task is %s although only a non-essential container exited", end.LastStatus)
		}
	})
}

// TestDeregisterEndsSession: the device is out at once, its task goes.
func TestDeregisterEndsSession(t *testing.T) {
	s := newSite(t, "process")
	task := s.run(t, "bye", container{"name": "c", "script": "while :; do sleep 0.1; done"})
	ctx := deadline(t, patience)
	if _, err := s.cli.Run(ctx, "instance", "deregister", s.instance); exitCode(err) == 0 {
		t.Error("an instance with running tasks was deregistered without --force")
	}
	if _, err := s.cli.Run(ctx, "instance", "deregister", s.instance, "--force"); err != nil {
		t.Fatal(err)
	}
	var i struct {
		Status    string
		Connected bool
	}
	if err := rig.Until(deadline(t, 2*time.Second), nil, "the session to end", func() error {
		if err := s.cli.JSON(ctx, &i, "instance", "describe", s.instance); err != nil {
			return err
		}
		if i.Connected || i.Status != "INACTIVE" {
			return fmt.Errorf("%+v", i)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	s.await(t, task.ID, "its task to be STOPPED", patience, stopped)
	if _, err := s.agent.Stop(20 * time.Second); err != nil {
		t.Error(err)
	}
	kill(t, task.Container("c").PID)
}
