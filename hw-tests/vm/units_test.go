// Package vm tests what a packaged device does under a real systemd with
// cgroup v2: the units of systemd/, installed where packages put things. It
// reboots, so it runs only in the machine that `make test-vm` boots: TestBefore
// at its first boot, TestAfter at its second.
package vm

import (
	"context"
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
	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

const (
	cluster    = "vm"
	remembered = "/var/lib/belay-vm/tasks.json" // what TestBefore leaves for TestAfter
	backWithin = 5 * time.Second                // of a real CPU: the promise after a restart
)

// left is what runs at the reboot, by runtime.
type left map[string]rig.Task

func slow(d time.Duration) time.Duration {
	n, _ := strconv.Atoi(os.Getenv(sdktest.SlowEnv))
	return d * time.Duration(max(n, 1))
}

// payload is where run.sh put what it built; without it nothing is touched.
func payload(t *testing.T) string {
	dir := os.Getenv("BELAY_TEST_UNITS")
	if dir == "" {
		t.Skip("installs units and reboots: run make test-vm")
	}
	return dir
}

func cli() *rig.CLI {
	token, _ := os.ReadFile("/var/lib/belay-control/admin.token")
	return &rig.CLI{Path: "/usr/bin/belay", Env: []string{"BELAY_ADDR=127.0.0.1:7443",
		"BELAY_TOKEN=" + strings.TrimSpace(string(token)), "BELAY_CA=/var/lib/belay-control/ca.pem"}}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// install puts everything where a package does.
func install(t *testing.T, from string) {
	t.Helper()
	for _, c := range [][]string{
		{"install", "-m", "755", from + "/bin/belay", from + "/bin/belay-agent", from + "/bin/belay-control", "/usr/bin/"},
		{"install", "-D", "-m", "755", "-t", "/usr/libexec/belay", from + "/bin/belay-plugins", from + "/bin/belay-supervise"},
		{"sh", "-c", "cp " + from + "/systemd/*.service " + from + "/systemd/*.slice /etc/systemd/system/"},
		{"sh", "-c", "cp " + from + "/systemd/tmpfiles.d/* /usr/lib/tmpfiles.d/ && cp " + from + "/systemd/sysusers.d/* /usr/lib/sysusers.d/ && cp " + from + "/systemd/sysctl.d/* /usr/lib/sysctl.d/"},
		{"systemd-sysusers"}, {"systemd-tmpfiles", "--create"}, {"systemctl", "daemon-reload"},
		{"ln", "-sfn", "../belay-plugins", "/usr/libexec/belay/plugins/process"},
		{"ln", "-sfn", "../belay-plugins", "/usr/libexec/belay/plugins/containerd"},
	} {
		command(t, c[0], c[1:]...)
	}
}

func journal(t *testing.T) {
	if !t.Failed() {
		return
	}
	for _, unit := range []string{"belay-control", "belay-agent", "containerd"} {
		out, _ := exec.Command("journalctl", "-b", "-u", unit, "-n", "60", "--no-pager", "-o", "cat").CombinedOutput()
		t.Logf("%s:\n%s", unit, out)
	}
}

func await(t *testing.T, id, what string, within time.Duration, ok func(rig.Task) bool) rig.Task {
	t.Helper()
	begun := time.Now()
	task, err := cli().Await(context.Background(), id, what, within, ok)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: after %s", what, time.Since(begun).Round(time.Millisecond))
	return task
}

func document(runtime, image string) string {
	// The first process of a PID namespace gets no signal it has no handler
	// for: without one, stopping the container takes its whole stopTimeout.
	c := map[string]any{"name": "main", "essential": true, "cpu": 256, "memory": 64, "command": []string{"/bin/sh", "-c", "trap 'exit 0' TERM; sleep 3600 & wait"}}
	doc := map[string]any{"family": runtime, "containerDefinitions": []any{c}}
	if runtime == "process" {
		c["command"] = []string{"/bin/sh", "-c", "exec sleep 3600"}
		doc["belay"] = map[string]any{"runtime": "process"}
	} else {
		c["image"] = image
	}
	b, _ := json.Marshal(doc)
	return string(b)
}

func agentPID(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(command(t, "systemctl", "show", "-P", "MainPID", "belay-agent.service"))
}

// limited checks that every plugin is in a slice of its own with the limits the
// agent tells, and not in the agent's group.
func limited(t *testing.T, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
	defer cancel()
	// A systemd that is busy puts a plugin into its unit later.
	if err := rig.Until(ctx, nil, when+" the plugins' limits to hold", func() error { return limits(t) }); err != nil {
		t.Error(err)
	}
}

// limits says which plugin's limit does not hold.
func limits(t *testing.T) error {
	var l struct {
		Plugins []struct {
			Name, State        string
			PID                int
			MemoryMaxBytes     uint64
			ProtectionsMissing []string
		}
	}
	if err := json.Unmarshal([]byte(command(t, "/usr/bin/belay-agent", "plugins", "-o", "json")), &l); err != nil {
		return err
	}
	if len(l.Plugins) != 2 {
		return fmt.Errorf("there are %d plugins", len(l.Plugins))
	}
	for _, p := range l.Plugins {
		if p.MemoryMaxBytes == 0 || len(p.ProtectionsMissing) > 0 {
			return fmt.Errorf("plugin %s: limit %d, missing %q", p.Name, p.MemoryMaxBytes, p.ProtectionsMissing)
		}
		group, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
		path := strings.TrimPrefix(strings.TrimSpace(string(group)), "0::")
		want := fmt.Sprintf("/belay.slice/belay-plugins.slice/belay-plugins-%s.slice/belay-plugins-%[1]s-%d.scope", p.Name, p.PID)
		limit, _ := os.ReadFile(filepath.Join("/sys/fs/cgroup", filepath.Dir(path), "memory.max"))
		if path != want || strings.TrimSpace(string(limit)) != fmt.Sprint(p.MemoryMaxBytes) {
			return fmt.Errorf("plugin %s is in %s with memory.max %s, want %s with %d", p.Name, path, limit, want, p.MemoryMaxBytes)
		}
	}
	return nil
}

func TestBefore(t *testing.T) {
	from := payload(t)
	t.Cleanup(func() { journal(t) })
	install(t, from)
	ctx, cancel := context.WithTimeout(context.Background(), slow(2*time.Minute))
	defer cancel()
	command(t, "systemctl", "enable", "--now", "belay-control.service")
	if err := rig.Until(ctx, nil, "the control plane to be ready", func() error {
		_, err := cli().Run(ctx, "cluster", "list", "--timeout", "5s")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	code, err := cli().Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	// Not enrolled: the unit's condition keeps it from starting, without harm.
	command(t, "systemctl", "enable", "--now", "belay-agent.service")
	if got := agentPID(t); got != "0" {
		t.Errorf("the agent of a device that is not enrolled runs as %s", got)
	}
	command(t, "/usr/bin/belay-agent", "enroll", "--activation", code)
	command(t, "systemctl", "start", "belay-agent.service")
	if _, err := cli().Connected(ctx, cluster, 1, "containerd", "process"); err != nil {
		t.Fatal(err)
	}

	limited(t, "at first")
	registry, err := rig.StartRegistry(ctx, t.TempDir(), rig.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	if _, err := images.Push(ctx, images.Target{Registry: registry.Address, PlainHTTP: true}, images.Options{Built: from + "/built", HostOnly: true}, images.Shell); err != nil {
		t.Fatal(err)
	}
	tasks := left{}
	for _, runtime := range []string{"containerd", "process"} {
		id, err := cli().RunTask(ctx, cluster, document(runtime, registry.Address+"/shell:1"))
		if err != nil {
			t.Fatal(err)
		}
		task := await(t, id, runtime+" task runs", slow(time.Minute), func(t rig.Task) bool { return t.LastStatus == "RUNNING" })
		tasks[runtime] = task
		pid := task.Container("main").PID
		group, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		path := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(strings.TrimSpace(string(group)), "0::"))
		limit, _ := os.ReadFile(filepath.Join(path, "memory.max"))
		t.Logf("%s: pid %d in %s, memory.max %s", runtime, pid, path, strings.TrimSpace(string(limit)))
		if string(limit) != "67108864\n" {
			t.Errorf("%s: memory.max of %s is %q, want 64 MiB", runtime, path, limit)
		}
		if strings.Contains(path, "belay-agent.service") {
			t.Errorf("%s: the task is in the agent's own cgroup %s", runtime, path)
		}
	}
	for _, end := range []struct {
		name string
		do   func()
	}{
		{"restart", func() { command(t, "systemctl", "restart", "belay-agent.service") }},
		{"kill -9", func() {
			pid := agentPID(t)
			command(t, "kill", "-9", pid)
			if err := rig.Until(ctx, nil, "systemd to start the agent again", func() error {
				if now := agentPID(t); now == pid || now == "0" {
					return fmt.Errorf("its pid is %s", now)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}},
		{"stop and start", func() {
			command(t, "systemctl", "stop", "belay-agent.service")
			command(t, "systemctl", "start", "belay-agent.service")
		}},
		{"daemon-reexec", func() { command(t, "systemctl", "daemon-reexec") }},
		{"restart of containerd", func() { command(t, "systemctl", "restart", "containerd.service") }},
		{"restart of the control plane", func() { command(t, "systemctl", "restart", "belay-control.service") }},
	} {
		end.do()
		ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
		if _, err := cli().Connected(ctx, cluster, 1, "containerd", "process"); err != nil {
			t.Errorf("after %s: %v", end.name, err)
		}
		cancel()
		limited(t, "after "+end.name)
		for runtime, was := range tasks {
			now := await(t, was.ID, "after "+end.name+" the "+runtime+" task runs", slow(backWithin), func(t rig.Task) bool { return t.LastStatus == "RUNNING" })
			if a, b := was.Container("main"), now.Container("main"); a.PID != b.PID || a.Attempt != b.Attempt || syscall.Kill(a.PID, 0) != nil {
				t.Errorf("after %s the %s task is attempt %d as process %d, was attempt %d as %d", end.name, runtime, b.Attempt, b.PID, a.Attempt, a.PID)
			}
		}
	}
	// The exit of a program that ends while its agent is gone is not lost.
	id, err := cli().RunTask(context.Background(), cluster, strings.Replace(document("process", ""), "exec sleep 3600", "sleep 1; while [ -e /var/tmp/wait ]; do sleep 0.2; done; exit 7", 1))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/var/tmp/wait", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, id, "a program that will end runs", slow(time.Minute), func(t rig.Task) bool { return t.LastStatus == "RUNNING" })
	command(t, "systemctl", "stop", "belay-agent.service")
	if err := os.Remove("/var/tmp/wait"); err != nil {
		t.Fatal(err)
	}
	<-time.After(slow(500 * time.Millisecond))
	command(t, "systemctl", "start", "belay-agent.service")
	ended := await(t, id, "its end is reported", slow(30*time.Second), func(t rig.Task) bool { return t.LastStatus == "STOPPED" })
	if c := ended.Container("main"); c.ExitCode == nil || *c.ExitCode != 7 {
		t.Errorf("its exit is %+v, want 7", c)
	}
	b, err := json.Marshal(tasks)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(remembered, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestAfter: the reboot ended every program; the agent starts their tasks
// again from its own state, as the next attempt, without the registry.
func TestAfter(t *testing.T) {
	payload(t)
	t.Cleanup(func() { journal(t) })
	b, err := os.ReadFile(remembered)
	if err != nil {
		t.Fatalf("TestBefore did not get far enough: %v", err)
	}
	var tasks left
	if err := json.Unmarshal(b, &tasks); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), slow(2*time.Minute))
	defer cancel()
	if _, err := cli().Connected(ctx, cluster, 1, "containerd", "process"); err != nil {
		t.Fatal(err)
	}
	for runtime, was := range tasks {
		t.Run(runtime, func(t *testing.T) {
			now := await(t, was.ID, "the task runs again", slow(time.Minute), func(t rig.Task) bool {
				c := t.Container("main")
				return t.LastStatus == "RUNNING" && c.LastStatus == "RUNNING" && c.Attempt > 1 && c.PID > 0
			})
			c := now.Container("main")
			t.Logf("attempt %d as process %d", c.Attempt, c.PID)
			if c.Attempt != 2 || syscall.Kill(c.PID, 0) != nil {
				t.Errorf("it is attempt %d as process %d, want a running attempt 2", c.Attempt, c.PID)
			}
			if _, err := cli().Run(ctx, "task", "stop", was.ID); err != nil {
				t.Fatal(err)
			}
			await(t, was.ID, "it stops", slow(time.Minute), func(t rig.Task) bool { return t.LastStatus == "STOPPED" })
			if err := rig.Until(ctx, nil, "its cgroups to be gone", func() error {
				if out, _ := exec.Command("find", "/sys/fs/cgroup", "-name", "*"+was.ID+"*").Output(); len(out) > 0 {
					return fmt.Errorf("there are\n%s", out)
				}
				return nil
			}); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		})
	}
}
