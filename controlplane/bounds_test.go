package controlplane_test

import (
	"strings"
	"testing"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// A device could write records of 4 MiB, again and again, into the store that
// all share.
func TestDevicesCannotFillTheStore(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})[0]
	large := strings.Repeat("x", 300<<10)

	told := facts()
	told.Attributes["a"] = large
	wantCode(t, f.ReportFacts(t.Context(), i.ID, controlplane.Hello{Facts: told}), controlplane.InvalidArgument, "bytes")
	e := enrollment(f.activation(t, controlplane.NewActivation{}), 2)
	e.Facts = told
	_, _, err := f.Enroll(t.Context(), e)
	wantCode(t, err, controlplane.InvalidArgument, "bytes")
	err = f.ReportTask(t.Context(), i.ID, &wire.TaskStatus{TaskId: task.ID, LastStatus: "RUNNING",
		Containers: []*wire.ContainerStatus{{Name: "s", LastStatus: "RUNNING", RuntimeId: large}}})
	wantCode(t, err, controlplane.InvalidArgument, "bytes")

	// What only says too much of an error is cut, not refused.
	told = facts()
	told.Plugins[0].LastError = large
	if err := f.ReportFacts(t.Context(), i.ID, controlplane.Hello{Hostname: large, Facts: told}); err != nil {
		t.Fatal(err)
	}
	f.report(t, task, &wire.TaskStatus{LastStatus: "RUNNING", Note: large,
		Containers: []*wire.ContainerStatus{{Name: "s", LastStatus: "RUNNING", Reason: large}}})
	for _, key := range []string{"instances/" + i.ID, "tasks/" + task.ID} {
		kv, err := f.store.Get(t.Context(), "/belay/v1/default/"+key)
		if err != nil || len(kv.Value) == 0 || len(kv.Value) > 32<<10 {
			t.Errorf("%s: %d bytes are stored, %v", key, len(kv.Value), err)
		}
	}
}
