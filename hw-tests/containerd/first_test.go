package containerd

import (
	"testing"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

func TestRunsAContainer(t *testing.T) {
	w := newWorld(t)
	a := w.attempt(sdk.TaskSpec{})
	q := w.request(a, sdk.NetworkNone, images.Workload, "print", "hello", "world")
	w.start(q)
	wantExit(t, w.exit(a), 0)
	if got := read(t, q.Stdout); got != "hello world\n" {
		t.Errorf("output %q", got)
	}
}

func TestBridge(t *testing.T) {
	w := newWorld(t)
	a := w.attempt(sdk.TaskSpec{Network: sdk.NetworkBridge})
	q := w.request(a, sdk.NetworkBridge, images.Workload, "sleep")
	c := w.start(q)
	t.Logf("%+v", c)
	st, err := w.rt.Stats(w.ctx(), a)
	t.Logf("%+v %v", st, err)
	res, err := w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: a, Command: []string{"/workload", "info"}})
	t.Logf("%s %v", res.Output, err)
	wantExit(t, func() sdk.Container { c, _ := w.rt.Stop(w.ctx(), a, 5e9); return c }(), 143)
}
