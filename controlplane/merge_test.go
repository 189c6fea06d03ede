package controlplane

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
)

func ptr[T any](v T) *T { return &v }

func TestMerge(t *testing.T) {
	t0, t1 := time.Unix(100, 0).UTC(), time.Unix(200, 0).UTC()
	running := Task{ID: "x", DesiredStatus: "RUNNING", LastStatus: "RUNNING", StartedAt: t0, Version: 3,
		Containers: []ContainerStatus{{Name: "a", Essential: true, LastStatus: "RUNNING", Attempt: 2, PID: 7, Image: "i", ImageDigest: "sha256:1"}}}
	with := func(f func(*Task)) Task {
		n := running
		n.Containers = append([]ContainerStatus(nil), n.Containers...)
		f(&n)
		return n
	}
	for _, c := range []struct {
		name   string
		have   Task
		report *wire.TaskStatus
		want   Task
		what   merged
	}{
		{"the same changes nothing", running,
			&wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "RUNNING", Attempt: 2, Pid: 7}}}, running, unchanged},
		{"an earlier status is an old report", running, &wire.TaskStatus{LastStatus: "PENDING", Note: "pulling"}, running, unchanged},
		{"an unknown status is none", running, &wire.TaskStatus{LastStatus: "FLYING"}, running, unchanged},
		{"an earlier attempt is an old report", running,
			&wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "STOPPED", Attempt: 1, ExitCode: ptr(int32(1))}}}, running, unchanged},
		{"an earlier status of the same attempt is an old report", with(func(n *Task) {
			n.Containers[0].LastStatus, n.Containers[0].ExitCode, n.Containers[0].PID = "STOPPED", ptr(0), 0
		}),
			&wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "RUNNING", Attempt: 2, Pid: 7}}},
			with(func(n *Task) {
				n.Containers[0].LastStatus, n.Containers[0].ExitCode, n.Containers[0].PID = "STOPPED", ptr(0), 0
			}), unchanged},
		{"exit code 0 is a value", running,
			&wire.TaskStatus{LastStatus: "STOPPED", StopCode: "EssentialContainerExited", StoppedReason: "essential container exited", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "STOPPED", Attempt: 2, ExitCode: ptr(int32(0))}}},
			with(func(n *Task) {
				n.LastStatus, n.DesiredStatus, n.StoppingAt, n.StoppedAt = "STOPPED", "STOPPED", t1, t1
				n.StopCode, n.StoppedReason, n.Version = "EssentialContainerExited", "essential container exited", 4
				n.Containers[0].LastStatus, n.Containers[0].ExitCode, n.Containers[0].PID = "STOPPED", ptr(0), 0
			}), changed},
		{"progress of a pull is transient", with(func(n *Task) { n.LastStatus, n.Containers[0].Attempt = "PENDING", 0 }),
			&wire.TaskStatus{LastStatus: "PENDING", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "RUNNING", Pid: 7, Pull: &wire.PullProgress{Layers: 2}}}},
			with(func(n *Task) {
				n.LastStatus, n.Containers[0].Attempt, n.Containers[0].Pull, n.Version = "PENDING", 0, &PullProgress{Layers: 2}, 4
			}), transient},
		{"a stopped task changes no more", with(func(n *Task) { n.LastStatus = "STOPPED" }),
			&wire.TaskStatus{LastStatus: "STOPPED", StoppedReason: "another"}, with(func(n *Task) { n.LastStatus = "STOPPED" }), unchanged},
		{"a task stopped before it ran has not started", Task{LastStatus: "PENDING"},
			&wire.TaskStatus{LastStatus: "STOPPED", StoppedReason: "no such image"},
			Task{LastStatus: "STOPPED", DesiredStatus: "STOPPED", StoppedReason: "no such image", StoppingAt: t1, StoppedAt: t1, Version: 1}, changed},
		{"a clock set back takes no time from a task", Task{LastStatus: "PENDING", CreatedAt: t1.Add(1), StoppingAt: t1.Add(2)},
			&wire.TaskStatus{LastStatus: "STOPPED", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "STOPPED", Attempt: 1, ExitCode: ptr(int32(0))}}},
			Task{LastStatus: "STOPPED", DesiredStatus: "STOPPED", CreatedAt: t1.Add(1), StoppingAt: t1.Add(2), StartedAt: t1.Add(2), StoppedAt: t1.Add(2), Version: 1,
				Containers: []ContainerStatus{{Name: "a", LastStatus: "STOPPED", Attempt: 1, ExitCode: ptr(0)}}}, changed},
		{"an exit nobody saw has no code", running,
			&wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "a", LastStatus: "STOPPED", Attempt: 2, Reason: "device rebooted"}, nil}},
			with(func(n *Task) {
				n.Version, n.Containers[0].LastStatus, n.Containers[0].Reason, n.Containers[0].PID = 4, "STOPPED", "device rebooted", 0
			}), changed},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, what := merge(c.have, c.report, t1)
			if diff := cmp.Diff(c.want, got); diff != "" || what != c.what {
				t.Errorf("merge said %d, want %d; %s", what, c.what, diff)
			}
		})
	}
}

// A device that names other containers in every report made the task grow
// until the store was full.
func TestMergeBoundsContainers(t *testing.T) {
	task := Task{LastStatus: StatusRunning}
	for n := range 3 * maxReported {
		task, _ = merge(task, &wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: fmt.Sprint(n), LastStatus: "RUNNING"}}}, time.Unix(1, 0))
	}
	if len(task.Containers) != maxReported {
		t.Errorf("%d containers, want at most %d", len(task.Containers), maxReported)
	}
}

// Whatever is reported, in whatever order: never backwards, and once stopped
// never different.
func TestMergeOnlyMovesForward(t *testing.T) {
	statuses := []string{"", "PROVISIONING", "PENDING", "ACTIVATING", "RUNNING", "DEACTIVATING", "STOPPING", "DEPROVISIONING", "STOPPED", "X"}
	rapid.Check(t, func(rt *rapid.T) {
		task := Task{LastStatus: StatusProvisioning, DesiredStatus: StatusRunning}
		for range rapid.IntRange(1, 20).Draw(rt, "reports") {
			s := &wire.TaskStatus{LastStatus: rapid.SampledFrom(statuses).Draw(rt, "status"), Note: rapid.SampledFrom([]string{"", "a"}).Draw(rt, "note")}
			for range rapid.IntRange(0, 2).Draw(rt, "containers") {
				c := &wire.ContainerStatus{Name: rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "name"), Attempt: rapid.Uint32Range(0, 3).Draw(rt, "attempt"), LastStatus: rapid.SampledFrom(statuses).Draw(rt, "container status")}
				if rapid.Bool().Draw(rt, "exited") {
					c.ExitCode = ptr(int32(rapid.IntRange(0, 2).Draw(rt, "code")))
				}
				s.Containers = append(s.Containers, c)
			}
			next, what := merge(task, s, time.Unix(1, 0))
			if rank(next.LastStatus) < rank(task.LastStatus) {
				rt.Fatalf("from %s to %s", task.LastStatus, next.LastStatus)
			}
			if (what == unchanged) != cmp.Equal(task, next) || what != unchanged && next.Version != task.Version+1 {
				rt.Fatalf("merge said %d: %s", what, cmp.Diff(task, next))
			}
			if task.LastStatus == StatusStopped && what != unchanged {
				rt.Fatal("a stopped task changed")
			}
			for _, old := range task.Containers {
				for _, c := range next.Containers {
					if c.Name == old.Name && (c.Attempt < old.Attempt || c.Attempt == old.Attempt && (old.ExitCode != nil && c.ExitCode == nil || rank(c.LastStatus) < rank(old.LastStatus))) {
						rt.Fatalf("container from %+v to %+v", old, c)
					}
				}
			}
			task = next
		}
	})
}
