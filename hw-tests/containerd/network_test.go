package containerd

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// freePort is a TCP port of this host nobody has.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func get(url string) (string, error) {
	c := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

func (w *world) serve(port int) (sdk.StartRequest, sdk.Container) {
	w.t.Helper()
	a := w.attempt(sdk.TaskSpec{Network: sdk.NetworkBridge})
	q := w.request(a, sdk.NetworkBridge, images.Workload, "serve", ":8080", "hello from")
	q.Spec.Ports = []sdk.PortMapping{{Name: "web", Protocol: "tcp", ContainerPort: 8080, HostPort: port}}
	return q, w.start(q)
}

func TestBridgeNetwork(t *testing.T) {
	w := newWorld(t)
	before := leftovers(t, w)
	port := freePort(t)
	q, c := w.serve(port)
	if c.IP == "" || cmp.Diff(c.Ports, q.Spec.Ports) != "" {
		t.Errorf("started as %+v", c)
	}
	for _, url := range []string{fmt.Sprintf("http://127.0.0.1:%d/a", port), fmt.Sprintf("http://%s:8080/a", c.IP)} {
		w.eventually("an answer from "+url, func() bool {
			body, err := get(url)
			return err == nil && strings.HasPrefix(body, "hello from ")
		})
	}
	t.Run("another container reaches it", func(t *testing.T) {
		w.t = t
		end, out := w.exits(sdk.TaskSpec{Network: sdk.NetworkBridge}, images.Workload, nil, "get", "http://"+c.IP+":8080/b")
		wantExit(t, end, 0)
		if !strings.Contains(out, "hello from") {
			t.Errorf("output %q", out)
		}
	})
	t.Run("the port is taken", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{Network: sdk.NetworkBridge})
		second := w.request(a, sdk.NetworkBridge, images.Workload, "serve", ":8080")
		second.Spec.Ports = q.Spec.Ports
		_, err := w.rt.Start(w.ctx(), second)
		wantError(t, err, sdk.Conflict, fmt.Sprint(port), q.Attempt.Task)
		if _, ok := w.find(a); ok {
			t.Error("the refused container is there")
		}
	})
	t.Run("a program of the host has the port", func(t *testing.T) {
		w.t = t
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		taken := l.Addr().(*net.TCPAddr).Port
		second := w.request(w.attempt(sdk.TaskSpec{Network: sdk.NetworkBridge}), sdk.NetworkBridge, images.Workload, "serve", ":8080")
		second.Spec.Ports = []sdk.PortMapping{{Protocol: "tcp", ContainerPort: 8080, HostPort: taken}}
		_, err = w.rt.Start(w.ctx(), second)
		wantError(t, err, sdk.Conflict, fmt.Sprint(taken), "host")
	})
	t.Run("the next attempt takes the port over", func(t *testing.T) {
		w.t = t
		if _, err := w.rt.Stop(w.ctx(), q.Attempt, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		next := q
		next.Attempt.Number = 2
		w.start(next)
		w.eventually("an answer", func() bool {
			body, err := get(fmt.Sprintf("http://127.0.0.1:%d/a", port))
			return err == nil && strings.HasPrefix(body, "hello from ")
		})
	})
	w.t = t
	w.clear()
	if _, err := get(fmt.Sprintf("http://127.0.0.1:%d/a", port)); err == nil {
		t.Error("the port still answers")
	}
	if d := cmp.Diff(before, leftovers(t, w)); d != "" {
		t.Errorf("left behind (-before +after):\n%s", d)
	}
}

func TestHostAndNoNetwork(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for network, code := range map[string]int{sdk.NetworkHost: 0, sdk.NetworkNone: 1, sdk.NetworkBridge: 1} {
		t.Run(network, func(t *testing.T) {
			w.t = t
			c, _ := w.exits(sdk.TaskSpec{Network: network}, images.Workload, nil, "dial", "tcp", l.Addr().String())
			wantExit(t, c, code)
		})
	}
	t.Run("ports need a bridge", func(t *testing.T) {
		w.t = t
		q := w.request(w.attempt(sdk.TaskSpec{Network: sdk.NetworkHost}), sdk.NetworkHost, images.Workload)
		q.Spec.Ports = []sdk.PortMapping{{Protocol: "tcp", ContainerPort: 1, HostPort: 2}}
		_, err := w.rt.Start(w.ctx(), q)
		wantError(t, err, sdk.Invalid, "bridge")
	})
}

func TestNamespaceModes(t *testing.T) {
	w := newWorld(t)
	t.Run("pid host", func(t *testing.T) {
		w.t = t
		i := w.infoIn(sdk.TaskSpec{PIDMode: "host"})
		if i.PID < 10 {
			t.Errorf("pid %d looks like one of a namespace of its own", i.PID)
		}
	})
	t.Run("pid task is refused", func(t *testing.T) {
		err := w.rt.PrepareTask(w.ctx(), sdk.TaskSpec{ID: strings.Repeat("e", 32), Network: sdk.NetworkNone, PIDMode: "task"})
		wantError(t, err, sdk.Unsupported, "pidMode task")
	})
	t.Run("ipc of the task", func(t *testing.T) {
		w.t = t
		a := w.attempt(sdk.TaskSpec{IPCMode: "task"})
		one := w.request(a, sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "echo shared > /dev/shm/x; readlink /proc/self/ns/ipc")
		w.start(one)
		wantExit(t, w.exit(a), 0)
		b := a
		b.Container = "other"
		two := w.request(b, sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "cat /dev/shm/x; readlink /proc/self/ns/ipc")
		w.start(two)
		wantExit(t, w.exit(b), 0)
		if got, want := read(t, two.Stdout), "shared\n"+read(t, one.Stdout); got != want {
			t.Errorf("the other container sees %q, want %q", got, want)
		}
	})
}

func (w *world) infoIn(task sdk.TaskSpec) info {
	w.t.Helper()
	c, out := w.exits(task, images.Workload, nil, "info")
	wantExit(w.t, c, 0)
	return parseInfo(w.t, out)
}
