package blackbox

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

// TestColdBootWithoutNetwork: a board that lost its power, its control plane
// and its registry starts its tasks from what it holds, and does with each
// what was asked for before.
func TestColdBootWithoutNetwork(t *testing.T) {
	needRoot(t)
	control := newControl(t)
	cli := control.CLI()
	registry, err := rig.StartRegistry(deadline(t, patience), filepath.Join(tempDir(t), "r"), rig.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = registry.Close() })
	if _, err := images.Push(deadline(t, patience), images.Target{Registry: registry.Address, PlainHTTP: true},
		images.Options{Root: "../..", HostOnly: true}, images.Shell); err != nil {
		t.Fatal(err)
	}
	b := newBoard(t, cli, "pull_give_up = \"40s\"")
	b.boot()
	if _, err := cli.Connected(deadline(t, patience), cluster, 1, "containerd"); err != nil {
		t.Fatal(err)
	}

	shell := registry.Address + "/" + images.Shell + ":1"
	run := func(family string, belay any, containers ...container) string {
		t.Helper()
		for _, c := range containers {
			c["command"] = []any{"/bin/sh", "-c", c["script"]}
			delete(c, "script")
			if c["image"] == nil {
				c["image"] = shell
			}
			c["memory"] = 64
			c["mountPoints"] = []any{map[string]any{"sourceVolume": "test", "containerPath": b.dir}}
		}
		doc := map[string]any{"family": family, "networkMode": "host", "containerDefinitions": containers,
			"volumes": []any{map[string]any{"name": "test", "host": map[string]any{"sourcePath": b.dir}}}}
		if belay != nil {
			doc["belay"] = belay
		}
		raw, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		id, err := cli.RunTask(deadline(t, patience), cluster, string(raw))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	await := func(id, what string, ok func(rig.Task) bool) rig.Task {
		t.Helper()
		task, err := cli.Await(deadline(t, 2*patience), id, what, 2*patience, ok)
		if err != nil {
			t.Fatal(err)
		}
		return task
	}

	order, healthy := filepath.Join(b.dir, "order"), filepath.Join(b.dir, "healthy")
	pair := run("pair", nil,
		container{"name": "web", "essential": true, "dependsOn": []any{map[string]any{"containerName": "db", "condition": "HEALTHY"}},
			"script":        "echo web starts >> " + order + "; trap 'exit 143' TERM; while :; do sleep 0.2; done",
			"restartPolicy": map[string]any{"enabled": true, "restartAttemptPeriod": 60}},
		container{"name": "db", "essential": true,
			"healthCheck": map[string]any{"command": []any{"CMD-SHELL", "test -e " + healthy}, "interval": 5, "retries": 10},
			"script": "rm -f " + healthy + "; echo db starts >> " + order + "; sleep 3; echo db is ready >> " + order + "; touch " + healthy +
				"; trap 'exit 143' TERM; while :; do sleep 0.2; done"})
	stubborn := run("stubborn", nil, container{"name": "c", "stopTimeout": 100,
		"script": "trap '' TERM; echo started >> " + filepath.Join(b.dir, "stubborn") + "; while :; do sleep 0.2; done"})
	leash := run("leash", map[string]any{"disconnect": map[string]any{"stopAfter": 20}}, container{"name": "c", "script": "sleep 1000", "stopTimeout": 2})
	for _, id := range []string{pair, stubborn, leash} {
		await(id, "the task to run", running)
	}
	await(pair, "the task to be healthy", func(now rig.Task) bool { return now.Container("db").HealthStatus == "HEALTHY" })

	// What is asked for as the network goes.
	registry.Stop()
	waits := run("waits", nil, container{"name": "c", "image": registry.Address + "/later:1", "script": "sleep 1000"})
	await(waits, "the task to say what it waits for", func(now rig.Task) bool {
		return now.LastStatus == "PENDING" && strings.Contains(now.Note, "image pull failed") && strings.Contains(now.Note, "later")
	})
	if _, err := cli.Run(deadline(t, patience), "task", "stop", stubborn, "--reason", "enough"); err != nil {
		t.Fatal(err)
	}
	b.await(stubborn, "the stubborn task to be on its way to its end", func(now localTask) bool { return now.LastStatus == "STOPPING" })
	control.Kill()
	b.cut()

	b.boot()
	began := time.Now()
	up := b.await(pair, "the pair to run and be healthy", func(now localTask) bool {
		attempt, pid, _ := now.container("web")
		_, _, health := now.container("db")
		return now.LastStatus == "RUNNING" && attempt == 2 && pid > 0 && health == "HEALTHY"
	})
	t.Logf("running %s after the boot", time.Since(began).Round(100*time.Millisecond))
	// RUNNING is told before a program has come to its first line.
	once := "db starts\ndb is ready\nweb starts\n"
	if err := rig.Until(deadline(t, 10*time.Second), nil, "the order of the starts", func() error {
		lines, err := os.ReadFile(order)
		if d := cmp.Diff(once+once, string(lines)); d != "" {
			return fmt.Errorf("(-want +got):\n%s", d)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	b.await(stubborn, "the task that was to stop to have stopped", func(now localTask) bool { return now.LastStatus == "STOPPED" })
	now := b.await(waits, "the task without an image to wait and say why", func(now localTask) bool {
		return now.LastStatus == "PENDING" && strings.Contains(now.Note, "image pull failed")
	})
	t.Logf("it says: %s", now.Note)
	off := b.await(leash, "the task on a leash to stop", func(now localTask) bool { return now.LastStatus == "STOPPED" })
	if off.StopCode != "DeviceDisconnected" || !strings.Contains(off.StoppedReason, "20s") {
		t.Errorf("it stopped with %+v", off)
	}

	attempt, pid, _ := up.container("web")
	if os.Getenv("BELAY_TEST_OFFLINE") == "" {
		t.Log("no crash is tried, which takes a minute: run make test-offline")
	} else {
		// A crash, once it has run for as long as its restart policy asks.
		<-time.After(time.Until(began.Add(70 * time.Second)))
		if _, err := b.run("kill", "-9", strconv.Itoa(pid)); err != nil {
			t.Fatal(err)
		}
		again := b.await(pair, "the crashed container to run again", func(now localTask) bool {
			n, p, _ := now.container("web")
			return now.LastStatus == "RUNNING" && n == attempt+1 && p > 0
		})
		attempt, pid, _ = again.container("web")
	}
	// All the while longer than pull_give_up.
	b.await(waits, "the task without an image to wait", func(now localTask) bool { return now.LastStatus == "PENDING" })

	// The network is back.
	starts, err := os.ReadFile(order)
	if err != nil {
		t.Fatal(err)
	}
	if err := registry.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	pushAs(t, registry.Address, "later")
	if err := control.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	cli = control.CLI()
	seen := await(pair, "the API to show the pair as it runs", func(now rig.Task) bool {
		c := now.Container("web")
		return running(now) && c.Attempt == attempt && c.PID == pid && now.Container("db").HealthStatus == "HEALTHY"
	})
	if _, err := b.run("kill", "-0", strconv.Itoa(pid)); err != nil {
		t.Errorf("process %d of %+v does not live: %v", pid, seen, err)
	}
	await(waits, "the task to run once its image is there", running)
	if end := await(leash, "the API to show the end of the leash", stopped); end.StopCode != "DeviceDisconnected" {
		t.Errorf("it stopped with %+v", end)
	}
	if end := await(stubborn, "the API to show the end of the stubborn task", stopped); end.StopCode != "UserInitiated" || end.StoppedReason != "enough" {
		t.Errorf("it stopped with %+v", end)
	}
	if n, err := os.ReadFile(filepath.Join(b.dir, "stubborn")); err != nil || strings.Count(string(n), "started") != 1 {
		t.Errorf("the task that was to stop was started again: %q, %v", n, err)
	}
	if after, err := os.ReadFile(order); err != nil || string(after) != string(starts) {
		t.Errorf("the return of the network started something: %q, %v", after, err)
	}
	for _, id := range []string{pair, waits} {
		if _, err := cli.Run(deadline(t, patience), "task", "stop", id); err != nil {
			t.Fatal(err)
		}
		await(id, "the end", stopped)
	}
}

// pushAs pushes the shell image under another name.
func pushAs(t *testing.T, registry, as string) {
	t.Helper()
	from, err := name.ParseReference(registry+"/"+images.Shell+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	to, err := name.ParseReference(registry+"/"+as+":1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(from)
	if err == nil {
		err = remote.Write(to, img)
	}
	if err != nil {
		t.Fatal(err)
	}
}
