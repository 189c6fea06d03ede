package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	plugin "github.com/belay-edge/belay/plugins/docker"
	"github.com/belay-edge/belay/plugins/sdk"
)

// world is one agent's plugin with its directories.
type world struct {
	t   *testing.T
	d   *rig.Docker
	reg *rig.Registry
	rt  sdk.Runtime
}

// newWorld makes a plugin in this process, with more configuration. What a
// test leaves is removed.
func newWorld(t *testing.T, extra string) *world {
	t.Helper()
	d, reg := daemons(t)
	dir, err := os.MkdirTemp("", "bw")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, d: d, reg: reg}
	c := sdk.Config{StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		JSON: json.RawMessage(fmt.Sprintf(`{"address":%q,"cgroup_parent":"/belay-docker-test"%s}`, d.Address, extra))}
	if err := errors.Join(os.Mkdir(c.StateDir, 0o700), os.Mkdir(c.RunDir, 0o700)); err != nil {
		t.Fatal(err)
	}
	p := plugin.New("test")
	if err := p.Configure(w.ctx(), c); err != nil {
		t.Fatal(err)
	}
	w.rt = p.Runtime()
	t.Cleanup(func() {
		w.clear()
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the plugin's directories: %v", err)
		}
	})
	return w
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

// clear stops and removes everything.
func (w *world) clear() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	inv, err := w.rt.List(ctx)
	if err != nil {
		w.t.Errorf("List: %v", err)
		return
	}
	for _, c := range inv.Containers {
		if _, err := w.rt.Stop(ctx, c.Attempt, 0); err != nil && !errors.Is(err, sdk.NotFound) {
			w.t.Errorf("Stop: %v", err)
		}
		if err := w.rt.Remove(ctx, c.Attempt); err != nil {
			w.t.Errorf("Remove: %v", err)
		}
	}
	for _, id := range inv.Tasks {
		if err := w.rt.RemoveTask(ctx, id); err != nil {
			w.t.Errorf("RemoveTask: %v", err)
		}
	}
}

var tasks int

// request prepares a fresh task and asks for a container of the image in it.
func (w *world) request(task sdk.TaskSpec, image string, command ...string) sdk.StartRequest {
	w.t.Helper()
	tasks++
	task.ID = fmt.Sprintf("%032x", time.Now().UnixNano()+int64(tasks))
	if task.Network == "" {
		task.Network = sdk.NetworkNone
	}
	if err := w.rt.PrepareTask(w.ctx(), task); err != nil {
		w.t.Fatalf("PrepareTask: %v", err)
	}
	img, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: w.reg.Address + "/" + image + ":1"}, func(sdk.PullProgress) {})
	if err != nil {
		w.t.Fatalf("Pull %s: %v", image, err)
	}
	dir := w.t.TempDir()
	q := sdk.StartRequest{
		Attempt: sdk.Attempt{Task: task.ID, Container: "main", Number: 1}, Network: task.Network,
		Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err"),
		Spec: sdk.ContainerSpec{Image: img.Reference, Digest: img.Digest, Command: command},
	}
	if err := errors.Join(os.WriteFile(q.Stdout, nil, 0o600), os.WriteFile(q.Stderr, nil, 0o600)); err != nil {
		w.t.Fatal(err)
	}
	return q
}

// says starts a container, waits for its end, and returns what it put out,
// by the word each line begins with.
func (w *world) says(q sdk.StartRequest) map[string]string {
	w.t.Helper()
	if _, err := w.rt.Start(w.ctx(), q); err != nil {
		w.t.Fatalf("Start: %v", err)
	}
	c := w.exit(q.Attempt)
	out := read(w.t, q.Stdout)
	if c.ExitCode == nil || *c.ExitCode != 0 {
		w.t.Fatalf("it exited with %+v\n%s\n%s", c, out, read(w.t, q.Stderr))
	}
	by := map[string]string{}
	for line := range strings.Lines(out) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		by[word] = strings.TrimSpace(rest)
	}
	return by
}

// exit waits for an attempt's end and makes sure of its output.
func (w *world) exit(a sdk.Attempt) sdk.Container {
	w.t.Helper()
	var c sdk.Container
	if err := rig.Until(w.ctx(), nil, a.String()+" to exit", func() error {
		inv, err := w.rt.List(w.ctx())
		if err != nil {
			return err
		}
		i := slices.IndexFunc(inv.Containers, func(c sdk.Container) bool { return c.Attempt == a })
		if i < 0 || inv.Containers[i].State != sdk.StateExited {
			return fmt.Errorf("containers are %+v", inv.Containers)
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	c, err := w.rt.Stop(w.ctx(), a, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
