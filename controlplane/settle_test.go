package controlplane_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

func TestAdoptIsDoneOnceForAToken(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, web)
	ghost := f.run(t, controlplane.NewTasks{TaskDefinition: "web"})[0]
	if err := f.ReportFacts(t.Context(), i.ID, controlplane.Hello{Facts: facts(), Capabilities: []string{wire.CapabilityReconcile}}); err != nil {
		t.Fatal(err)
	}
	lost := controlplane.Position{Incarnation: f.Incarnation(), Sequence: 7, Mark: controlplane.Mark{Life: "another", Revision: 99}}
	if g, err := f.Meet(t.Context(), i.ID, lost, true); err != nil || !g.Reconcile {
		t.Fatal(g, err)
	}
	stray := strings.Repeat("5", 32)
	running := &wire.TaskStatus{TaskId: stray, LastStatus: "RUNNING"}
	wantCode(t, f.ReportTask(t.Context(), i.ID, running), controlplane.Unavailable, "yet to tell")
	_, _, err := f.AdoptInstance(t.Context(), "t1", i.ID)
	wantCode(t, err, controlplane.Precondition, "drop")
	spec := &wire.TaskSpec{Family: "lost", Revision: 3, Runtime: "process", Cpu: 512, MemoryMib: 100, Containers: []*wire.Container{{Name: "c", Essential: true}}}
	if err := f.ReportHoldings(t.Context(), i.ID, []*wire.Holding{{TaskId: stray, Desired: "RUNNING", Spec: spec, Status: running}, {TaskId: "nonsense", Spec: spec}}); err != nil {
		t.Fatal(err)
	}
	v, _, err := f.DescribeInstance(t.Context(), controlplane.Freshness{}, i.ID)
	if err != nil || v.Conflict == nil || len(v.Conflict.OnlyOnDevice) != 1 || len(v.Conflict.OnlyInStore) != 1 || v.Conflict.OnlyInStore[0].ID != ghost.ID {
		t.Fatalf("conflict %+v, %v", v.Conflict, err)
	}
	if want := 512 + 256; v.Used.CPU != want {
		t.Errorf("%d CPU taken, want %d: the stray's too", v.Used.CPU, want)
	}
	for range 2 {
		if v, _, err = f.AdoptInstance(t.Context(), "t1", i.ID); err != nil || v.Conflict != nil {
			t.Fatalf("conflict %+v, %v", v.Conflict, err)
		}
	}
	if got := f.describe(t, stray); got.LastStatus != "RUNNING" || got.Family != "lost" || got.Revision != 3 {
		t.Errorf("adopted: %+v", got)
	}
	if got := f.describe(t, ghost.ID); got.LastStatus != "STOPPED" || got.DesiredStatus != "STOPPED" {
		t.Errorf("ghost: %+v", got)
	}
	_, _, err = f.AdoptInstance(t.Context(), "t2", i.ID)
	wantCode(t, err, controlplane.Precondition, "no conflict")
	_, _, err = f.DropInstance(t.Context(), "t1", i.ID)
	wantCode(t, err, controlplane.InvalidArgument, "token")
	// Where the device was then is no conflict again: it gets the whole set.
	if g, err := f.Meet(t.Context(), i.ID, lost, true); err != nil || g.Reconcile || g.Sequence != 0 {
		t.Errorf("met again: %+v, %v", g, err)
	}
	set, err := f.Assignments(t.Context(), i.ID, f.Incarnation(), 0)
	if err != nil || !set.Full || !set.Settled {
		t.Errorf("set %+v, %v", set, err)
	}
	if d := cmp.Diff(512, f.view(t, i.ID).Used.CPU); d != "" {
		t.Errorf("CPU taken in the end (-want +got): %s", d)
	}
}

func (f *fixture) view(t *testing.T, id string) controlplane.InstanceView {
	t.Helper()
	v, _, err := f.DescribeInstance(t.Context(), controlplane.Freshness{}, id)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
