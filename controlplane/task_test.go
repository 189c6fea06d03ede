package controlplane_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

func (f *fixture) report(t *testing.T, task controlplane.Task, s *wire.TaskStatus) {
	t.Helper()
	s.TaskId = task.ID
	if err := f.ReportTask(t.Context(), task.Instance, s); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) describe(t *testing.T, id string) controlplane.Task {
	t.Helper()
	task, _, err := f.DescribeTask(t.Context(), controlplane.Freshness{}, id)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func TestTaskLife(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, web)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "web", StartedBy: "me"})[0]
	if task.LastStatus != controlplane.StatusProvisioning || task.DesiredStatus != controlplane.StatusRunning || task.Group != "family:web" {
		t.Errorf("a new task: %+v", task)
	}
	// Its port is taken until it has stopped.
	_, failures, _, err := f.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: "web"})
	if err != nil || len(failures) != 1 || failures[0].Reason != controlplane.ReasonPorts {
		t.Fatal(failures, err)
	}
	set, err := f.Assignments(t.Context(), i.ID, f.Incarnation(), 0)
	if err != nil || set.Full || len(set.Set) != 1 || set.Set[0].Desired != "RUNNING" || set.Sequence != 1 {
		t.Fatal(set, err)
	}
	f.report(t, task, &wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "web", LastStatus: "RUNNING", Pid: 7, Attempt: 1, RuntimeId: "r"}}})
	if got := f.describe(t, task.ID[:6]); got.LastStatus != "RUNNING" || got.StartedAt.IsZero() || got.Containers[0].PID != 7 || !got.Containers[0].Essential {
		t.Errorf("running: %+v", got)
	}
	stopped, _, err := f.StopTask(t.Context(), "", task.ID, "enough")
	if err != nil || stopped.DesiredStatus != "STOPPED" || stopped.LastStatus != "RUNNING" || stopped.StopCode != "UserInitiated" {
		t.Fatal(stopped, err)
	}
	set, err = f.Assignments(t.Context(), i.ID, f.Incarnation(), 1)
	if err != nil || set.Full || len(set.Set) != 1 || set.Set[0].Desired != "STOPPED" || set.Set[0].StopReason != "enough" || set.Sequence != 2 {
		t.Fatal(set, err)
	}
	code := int32(143)
	f.report(t, task, &wire.TaskStatus{LastStatus: "STOPPED", Containers: []*wire.ContainerStatus{{Name: "web", LastStatus: "STOPPED", ExitCode: &code, Attempt: 1}}})
	got := f.describe(t, task.ID)
	if got.LastStatus != "STOPPED" || got.Containers[0].ExitCode == nil || *got.Containers[0].ExitCode != 143 || got.StoppedReason != "enough" {
		t.Errorf("stopped: %+v", got)
	}
	f.run(t, controlplane.NewTasks{TaskDefinition: "web"}) // there is room again

	// Another's task is not its to report.
	wantCode(t, f.ReportTask(t.Context(), f.device(t, 2).ID, &wire.TaskStatus{TaskId: task.ID, LastStatus: "RUNNING"}), controlplane.NotFound)
}

// A definition's constraints choose among devices by what operators and the
// devices themselves say, and an instance named by hand must meet them too.
func TestPlacementConstraints(t *testing.T) {
	f := newPlane(t)
	enrol := func(n int, site string) controlplane.Instance {
		code := f.activation(t, controlplane.NewActivation{Attributes: map[string]string{"site": site}})
		i, _, err := f.Enroll(t.Context(), enrollment(code, n))
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	lab, shed := enrol(1, "lab"), enrol(2, "shed")
	f.register(t, `{"family":"idle","belay":{"runtime":"process"},"containerDefinitions":[{"name":"s","command":["/bin/sleep","600"]}],
		"placementConstraints":[{"type":"memberOf","expression":"attribute:site in [shed, barn] and attribute:belay.arch == amd64"},
		{"type":"memberOf","expression":"runningTasksCount < 1"}]}`)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "idle"})[0]
	if task.Instance != shed.ID {
		t.Errorf("placed on %s, want %s", task.Instance, shed.ID)
	}
	refused := func(n controlplane.NewTasks, want ...string) {
		t.Helper()
		ts, failures, _, err := f.RunTask(t.Context(), n)
		if err != nil || len(ts) != 0 || len(failures) != len(want) {
			t.Fatal(ts, failures, err)
		}
		for _, failure := range failures {
			if failure.Reason != controlplane.ReasonConstraint || !slices.Contains(want, failure.Instance+" "+failure.Detail) {
				t.Errorf("failure %+v, want one of %q", failure, want)
			}
		}
	}
	notInShed := lab.ID + ` attribute:site in [shed, barn]: it is "lab"`
	refused(controlplane.NewTasks{TaskDefinition: "idle", Instance: lab.ID}, notInShed)
	// A task that is only on its way does not count as running, as in ECS.
	f.run(t, controlplane.NewTasks{TaskDefinition: "idle"})
	f.report(t, task, &wire.TaskStatus{LastStatus: "RUNNING"})
	refused(controlplane.NewTasks{TaskDefinition: "idle"}, notInShed, shed.ID+` runningTasksCount < 1: it is "1"`)
}

// A task that ended by itself, which nobody wished to stop, is never wished
// RUNNING again: not to a device that has everything, not to one that has
// nothing, and not by a control plane that was started anew.
func TestFinishedTaskIsNeverSentAsRunning(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})[0]
	f.report(t, task, &wire.TaskStatus{LastStatus: "STOPPED"})
	for _, p := range []*fixture{f, open(t, f.store)} {
		for _, from := range []struct {
			incarnation string
			sequence    uint64
		}{{"", 0}, {p.Incarnation(), 0}, {p.Incarnation(), 99}} {
			set, err := p.Assignments(t.Context(), i.ID, from.incarnation, from.sequence)
			if err != nil || len(set.Set) != 1 || set.Set[0].Desired != "STOPPED" || set.Set[0].Spec != nil {
				t.Errorf("to a device at %+v: %v, %v; want it STOPPED, without a specification", from, set.Set, err)
			}
		}
		// A report of before, stored late, changes nothing.
		p.report(t, task, &wire.TaskStatus{LastStatus: "RUNNING"})
	}
}

func TestReportThatChangesNothingWritesNothing(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})[0]
	status := func() *wire.TaskStatus {
		return &wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{Name: "s", LastStatus: "RUNNING", Pid: 7, Attempt: 1}}}
	}
	f.report(t, task, status())
	before, _ := f.store.Revision(t.Context())
	f.report(t, task, status())
	f.report(t, task, &wire.TaskStatus{LastStatus: "PENDING"}) // an old one
	if err := f.ReportFacts(t.Context(), i.ID, controlplane.Hello{Facts: facts()}); err != nil {
		t.Fatal(err)
	}
	if after, _ := f.store.Revision(t.Context()); after != before {
		t.Errorf("revision %d, want %d", after, before)
	}
	if got := f.describe(t, task.ID); got.LastStatus != "RUNNING" {
		t.Errorf("went back to %s", got.LastStatus)
	}
}

func TestPullProgressIsSeenButNotWritten(t *testing.T) {
	f := newPlane(t)
	f.device(t, 1)
	f.register(t, web)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "web"})[0]
	pulling := func(done uint64) *wire.TaskStatus {
		return &wire.TaskStatus{LastStatus: "PENDING", Containers: []*wire.ContainerStatus{{Name: "web", LastStatus: "PENDING", Pull: &wire.PullProgress{Bytes: 100, BytesDone: done}}}}
	}
	f.report(t, task, pulling(1))
	before, _ := f.store.Revision(t.Context())
	was := f.describe(t, task.ID)
	f.report(t, task, pulling(50))
	got := f.describe(t, task.ID)
	if after, _ := f.store.Revision(t.Context()); after != before || got.Containers[0].Pull.BytesDone != 50 || got.Version <= was.Version {
		t.Errorf("revision %d to %d, progress %+v", before, after, got.Containers[0].Pull)
	}
}

// A task that memory does not have may be in the store: with memory behind,
// the device was told to remove a task that runs.
func TestReportOfATaskThatMemoryLacksIsNotRefused(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	id := strings.Repeat("a", 32)
	report := &wire.TaskStatus{TaskId: id, LastStatus: "RUNNING"}
	wantCode(t, f.ReportTask(t.Context(), i.ID, report), controlplane.NotFound)

	// The store has it, but not in a form that memory can take in.
	if _, _, err := f.store.Txn(t.Context(), nil, []controlplane.Op{controlplane.Put("/belay/v1/default/tasks/"+id, []byte("{"))}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, f.ReportTask(t.Context(), i.ID, report), controlplane.Unavailable)
}

func TestDeregisterStopsTasks(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	var tasks []controlplane.Task
	for range 12 { // more than one batch
		tasks = append(tasks, f.run(t, controlplane.NewTasks{TaskDefinition: "sleep", Count: 10})...)
	}
	_, _, err := f.DeregisterInstance(t.Context(), "", i.ID, false)
	wantCode(t, err, controlplane.Precondition, "120 task")
	v, _, err := f.DeregisterInstance(t.Context(), "", i.ID, true)
	if err != nil || v.Status != controlplane.InstanceInactive || v.Used.CPU != 0 {
		t.Fatal(v, err)
	}
	for _, task := range tasks {
		if got := f.describe(t, task.ID); got.LastStatus != "STOPPED" || got.StoppedReason != "instance deregistered" {
			t.Fatalf("task %+v", got)
		}
	}
	_, failures, _, err := f.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: "sleep"})
	if err != nil || len(failures) != 1 || failures[0].Reason != controlplane.ReasonMissing {
		t.Errorf("placed on a deregistered instance: %v, %v", failures, err)
	}
}

func TestWatchTasks(t *testing.T) {
	f := newPlane(t)
	f.device(t, 1)
	f.register(t, sleep)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})[0]
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var got []string
	err := f.WatchTasks(ctx, controlplane.Freshness{}, []string{task.ID}, func(task controlplane.Task, _ int64) error {
		got = append(got, task.LastStatus)
		next := map[string]string{"PROVISIONING": "RUNNING", "RUNNING": "STOPPED"}[task.LastStatus]
		if next == "" {
			return nil
		}
		return f.ReportTask(ctx, task.Instance, &wire.TaskStatus{TaskId: task.ID, LastStatus: next})
	})
	if err != nil || fmt.Sprint(got) != "[PROVISIONING RUNNING STOPPED]" {
		t.Errorf("watched %v, %v", got, err)
	}
}

func TestWatchInstance(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	ctx, cancel := context.WithCancel(t.Context())
	woken, done := make(chan struct{}, 100), make(chan error)
	go func() { done <- f.WatchInstance(ctx, i.ID, func() { woken <- struct{}{} }) }()
	await := func(what string) {
		t.Helper()
		select {
		case <-woken:
		case <-time.After(20 * time.Second):
			t.Fatalf("not woken by %s", what)
		}
	}
	await("the beginning")
	f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})
	await("a task")
	if _, _, err := f.DeregisterInstance(t.Context(), "", i.ID, true); err != nil {
		t.Fatal(err)
	}
	await("its end")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestSurvivesCompaction(t *testing.T) {
	f := newPlane(t)
	f.device(t, 1)
	// The watch breaks, and what follows is forgotten before it is back.
	broken := true
	var mu sync.Mutex
	f.store.FailWith(func(op string) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "watch" && broken {
			return errors.New("cut")
		}
		return nil
	})
	for n := range 3 {
		if _, _, err := f.store.Txn(t.Context(), nil, []controlplane.Op{controlplane.Put("/belay/v1/default/clusters/c", fmt.Appendf(nil, `{"name":"c%d"}`, n))}); err != nil {
			t.Fatal(err)
		}
	}
	f.store.Compact()
	mu.Lock()
	broken = false
	mu.Unlock()
	c, _, err := f.DescribeCluster(t.Context(), controlplane.Freshness{Consistent: true}, "c")
	if err != nil || c.Name != "c2" {
		t.Errorf("%+v, %v; want what was written last", c, err)
	}
}

func TestClusters(t *testing.T) {
	f := newPlane(t)
	ctx := t.Context()
	if _, _, err := f.CreateCluster(ctx, "", "a b"); !errors.Is(err, controlplane.InvalidArgument) {
		t.Error(err)
	}
	if _, _, err := f.CreateCluster(ctx, "", "shop"); err != nil {
		t.Fatal(err)
	}
	code := f.activation(t, controlplane.NewActivation{Cluster: "shop"})
	_, err := f.DeleteCluster(ctx, "", "shop")
	wantCode(t, err, controlplane.Precondition, "activation")
	if _, err := f.DeleteActivation(ctx, "", code.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := f.DeleteCluster(ctx, "", "shop"); err != nil {
		t.Fatal(err)
	}
	_, err = f.DeleteCluster(ctx, "", "default")
	wantCode(t, err, controlplane.Precondition)
	_, err = f.DeleteCluster(ctx, "", "shop")
	wantCode(t, err, controlplane.NotFound)
}

func TestTaskDefinitionRevisions(t *testing.T) {
	f := newPlane(t)
	ctx := t.Context()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, _, err := f.RegisterTaskDefinition(ctx, "", []byte(sleep)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	d, _, err := f.DescribeTaskDefinition(ctx, controlplane.Freshness{}, "sleep")
	if err != nil || d.Revision != 20 {
		t.Fatal(d, err)
	}
	if _, _, err := f.DeregisterTaskDefinition(ctx, "", "sleep:20"); err != nil {
		t.Fatal(err)
	}
	if d, _, err = f.DescribeTaskDefinition(ctx, controlplane.Freshness{}, "sleep"); err != nil || d.Revision != 19 {
		t.Fatal(d, err)
	}
	_, _, _, err = f.RunTask(ctx, controlplane.NewTasks{TaskDefinition: "sleep:20"})
	wantCode(t, err, controlplane.Precondition, "INACTIVE")
	seen := 0
	for page := (controlplane.Page{Limit: 7}); ; {
		ds, next, _, err := f.ListTaskDefinitions(ctx, controlplane.Freshness{}, "sleep", false, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range ds {
			if seen++; d.Revision != seen {
				t.Errorf("revision %d at place %d", d.Revision, seen)
			}
		}
		if page.Token = next; next == "" {
			break
		}
	}
	if seen != 19 {
		t.Errorf("%d ACTIVE revisions in pages, want 19", seen)
	}
}

func TestSweep(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, sleep)
	old := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep", Token: "x"})[0]
	live := f.run(t, controlplane.NewTasks{TaskDefinition: "sleep"})[0]
	f.report(t, old, &wire.TaskStatus{LastStatus: "STOPPED"})
	f.clock.add(25 * time.Hour)
	if err := f.SweepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, _, err := f.DescribeTask(t.Context(), controlplane.Freshness{Consistent: true}, old.ID)
	wantCode(t, err, controlplane.NotFound)
	f.describe(t, live.ID)
	for _, prefix := range []string{"/belay/v1/default/tokens/", "/belay/v1/default/taskspecs/" + old.ID} {
		if kvs, _, _ := f.store.List(t.Context(), prefix, "", 0); len(kvs) != 0 {
			t.Errorf("%d keys left under %s", len(kvs), prefix)
		}
	}
	if set, err := f.Assignments(t.Context(), i.ID, "", 0); err != nil || len(set.Set) != 1 {
		t.Errorf("assignments %v, %v", set, err)
	}
}

// A round of the sweep deleted at most 1000 of each kind, and there was one
// round a minute: with more than 16 calls a second the store only grew.
func TestSweepKeepsUp(t *testing.T) {
	f := newPlane(t)
	const many = 2500
	for n := range many {
		id := fmt.Sprintf("%032x", n)
		if _, _, err := f.store.Txn(t.Context(), nil, []controlplane.Op{
			controlplane.Put("/belay/v1/default/tokens/"+id, []byte(`{"createdAt":"2020-01-01T00:00:00Z"}`)),
			controlplane.Put("/belay/v1/default/tasks/"+id, fmt.Appendf(nil, `{"id":%q,"lastStatus":"STOPPED","stoppedAt":"2020-01-01T00:00:00Z"}`, id)),
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, _, err := f.ListClusters(t.Context(), controlplane.Freshness{Consistent: true}, controlplane.Page{}); err != nil {
		t.Fatal(err)
	}
	if err := f.SweepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"tokens", "tasks"} {
		if kvs, _, err := f.store.List(t.Context(), "/belay/v1/default/"+kind+"/", "", 0); err != nil || len(kvs) > 0 {
			t.Errorf("%d of %d %s are left, %v", len(kvs), many, kind, err)
		}
	}
}

// However placements and stops race, over two replicas, no instance is ever
// given more than it has.
func TestRacingPlacementsNeverOvercommit(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		f := newPlane(t)
		g := open(t, f.store)
		devices := rapid.IntRange(1, 3).Draw(rt, "devices")
		for n := range devices {
			f.device(t, n)
		}
		memory := rapid.SampledFrom([]int{500, 900, 1500, 3000}).Draw(rt, "memory")
		ports := rapid.Bool().Draw(rt, "ports")
		document := fmt.Sprintf(`{"family":"x","containerDefinitions":[{"name":"c","image":"i:1","memory":%d}]}`, memory)
		if ports {
			document = fmt.Sprintf(`{"family":"x","containerDefinitions":[{"name":"c","image":"i:1","memory":%d,"portMappings":[{"containerPort":80,"hostPort":80}]}]}`, memory)
		}
		f.register(t, document)
		room := 4000 / memory
		if ports {
			room = 1
		}
		counts := rapid.SliceOfN(rapid.IntRange(1, 4), 2, 8).Draw(rt, "counts")
		var wg sync.WaitGroup
		var mu sync.Mutex
		placed := 0
		if _, _, err := g.DescribeTaskDefinition(t.Context(), controlplane.Freshness{Consistent: true}, "x"); err != nil {
			rt.Fatal(err)
		}
		for n, count := range counts {
			wg.Go(func() {
				ts, _, _, err := []*fixture{f, g}[n%2].RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: "x", Count: count})
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				placed += len(ts)
			})
		}
		wg.Wait()
		asked := 0
		for _, c := range counts {
			asked += c
		}
		if want := min(asked, devices*room); placed != want {
			rt.Errorf("%d of %d tasks placed with room for %d", placed, asked, devices*room)
		}
		vs, _, _, err := f.ListInstances(t.Context(), controlplane.Freshness{Consistent: true}, "", controlplane.Page{})
		if err != nil {
			rt.Fatal(err)
		}
		for _, v := range vs {
			if v.Used.MemoryMiB > v.Facts.MemoryMiB || v.Used.MemoryMiB/memory > room {
				rt.Errorf("instance uses %d of %d MiB", v.Used.MemoryMiB, v.Facts.MemoryMiB)
			}
		}
	})
}
