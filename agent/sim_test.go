package agent

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// simRuntime is a runtime that can be as bad as the contract allows. It counts
// processes: every violation of "started once" is noted.
type simRuntime struct {
	down       bool
	containers map[sdk.Attempt]*simContainer
	tasks      map[string]bool
	started    map[sdk.Attempt]int
	exits      map[sdk.Attempt]*int // true exits; nil: nobody saw it
	violations []string
	journal    *simJournal
	healthy    bool
	// next is how the next call goes wrong; "" for well.
	next string
	pid  int

	// images by digest, with their references; nil: it keeps no account.
	images map[string][]string
	disk   sdk.Disk
}

type simContainer struct {
	state sdk.State
	code  *int
	pid   int
	image string

	devices []string
}

func newSimRuntime(j *simJournal) *simRuntime {
	return &simRuntime{
		containers: map[sdk.Attempt]*simContainer{}, tasks: map[string]bool{}, started: map[sdk.Attempt]int{},
		exits: map[sdk.Attempt]*int{}, journal: j, healthy: true, pid: 100,
	}
}

// trouble takes the planned failure of this call: before says that it fails
// without effect, after that it has its effect and fails all the same.
func (r *simRuntime) trouble() (before, after error) {
	mode := r.next
	r.next = ""
	if r.down {
		return sdk.Unavailable, nil
	}
	switch mode {
	case "unavailable":
		return sdk.Unavailable, nil
	case "deadline":
		return sdk.Deadline, nil
	case "exhausted":
		return sdk.Exhausted, nil
	case "unavailable after":
		return nil, sdk.Unavailable
	case "deadline after":
		return nil, sdk.Deadline
	}
	return nil, nil
}

func (r *simRuntime) violate(format string, args ...any) {
	r.violations = append(r.violations, fmt.Sprintf(format, args...))
}

func (r *simRuntime) live(task, container string) []sdk.Attempt {
	var out []sdk.Attempt
	for a, c := range r.containers {
		if (task == "" || a.Task == task) && (container == "" || a.Container == container) && c.state == sdk.StateRunning {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b sdk.Attempt) int { return strings.Compare(a.String(), b.String()) })
	return out
}

func (r *simRuntime) exit(a sdk.Attempt, code *int) {
	c := r.containers[a]
	c.state, c.code, c.pid = sdk.StateExited, code, 0
	r.exits[a] = code
}

func (r *simRuntime) see(a sdk.Attempt) sdk.Container {
	c := r.containers[a]
	s := sdk.Container{Attempt: a, RuntimeID: a.String(), State: c.state, PID: c.pid, ExitCode: c.code, ImageDigest: cmp.Or(c.image, "sha256:1")}
	if c.state == sdk.StateExited && c.code == nil {
		s.Reason = "nobody saw it"
	}
	return s
}

func (r *simRuntime) Info(context.Context) (sdk.RuntimeInfo, error) {
	if r.down {
		return sdk.RuntimeInfo{}, sdk.Unavailable
	}
	return sdk.RuntimeInfo{Images: true, Exec: true, Networks: []string{sdk.NetworkBridge}}, nil
}

func (r *simRuntime) PrepareTask(_ context.Context, t sdk.TaskSpec) error {
	before, after := r.trouble()
	if before == nil {
		r.tasks[t.ID] = true
	}
	return firstOf(before, after)
}

func (r *simRuntime) RemoveTask(_ context.Context, task string) error {
	before, after := r.trouble()
	if before == nil {
		delete(r.tasks, task)
		for a := range r.containers {
			if a.Task == task {
				r.violate("RemoveTask %s before %s was removed", task, a)
			}
		}
	}
	return firstOf(before, after)
}

func (r *simRuntime) Pull(_ context.Context, p sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	before, after := r.trouble()
	if err := firstOf(before, after); err != nil {
		return sdk.Image{}, err
	}
	progress(sdk.PullProgress{Layers: 1})
	if r.images != nil {
		name, _, pinned := strings.Cut(p.Image, "@")
		repo := repository(name)
		digest := "sha256:" + repo
		if pinned && !strings.HasSuffix(p.Image, "@"+digest) {
			r.violate("%s was pulled", p.Image)
		}
		r.images[digest] = []string{"registry.test/" + repo + "@" + digest}
		return sdk.Image{Reference: name, Digest: digest}, nil
	}
	return sdk.Image{Reference: "registry.test/" + p.Image, Digest: "sha256:1"}, nil
}

func (r *simRuntime) Start(_ context.Context, q sdk.StartRequest) (sdk.Container, error) {
	before, after := r.trouble()
	if before != nil {
		return sdk.Container{}, before
	}
	a := q.Attempt
	if c := r.containers[a]; c == nil || c.state == sdk.StateCreated {
		if !r.tasks[a.Task] {
			r.violate("%s was started in a task that is not prepared", a)
		}
		if r.started[a]++; r.started[a] > 1 {
			r.violate("%s was started %d times", a, r.started[a])
		}
		if l := r.live(a.Task, a.Container); len(l) > 0 {
			r.violate("%s was started while %v runs", a, l)
		}
		if r.images != nil && r.images[q.Spec.Digest] == nil {
			r.violate("%s was to start from %s %s, which was removed", a, q.Spec.Image, q.Spec.Digest)
		}
		if !r.journal.recorded(a) {
			r.violate("%s was started before it was on record", a)
		}
		r.pid++
		r.containers[a] = &simContainer{state: sdk.StateRunning, pid: r.pid, image: q.Spec.Digest, devices: r.given(a, q.Spec.Devices)}
	}
	if after != nil {
		return sdk.Container{}, after
	}
	return r.see(a), nil
}

func (r *simRuntime) Stop(_ context.Context, a sdk.Attempt, _ time.Duration) (sdk.Container, error) {
	before, after := r.trouble()
	if before != nil {
		return sdk.Container{}, before
	}
	c := r.containers[a]
	if c == nil {
		return sdk.Container{}, sdk.NotFound
	}
	if c.state == sdk.StateRunning {
		code := 143
		r.exit(a, &code)
	}
	if after != nil {
		return sdk.Container{}, after
	}
	return r.see(a), nil
}

func (r *simRuntime) Remove(_ context.Context, a sdk.Attempt) error {
	before, after := r.trouble()
	if before != nil {
		return before
	}
	if c := r.containers[a]; c != nil && c.state == sdk.StateRunning {
		return sdk.Conflict
	}
	if c := r.containers[a]; c != nil && c.code != nil && !r.journal.exited(a) && !r.journal.forgot(a.Task) {
		r.violate("%s was removed before its exit was on record", a)
	}
	delete(r.containers, a)
	return after
}

func (r *simRuntime) List(context.Context) (sdk.Inventory, error) {
	before, after := r.trouble()
	if err := firstOf(before, after); err != nil {
		return sdk.Inventory{}, err
	}
	var inv sdk.Inventory
	for a := range r.containers {
		inv.Containers = append(inv.Containers, r.see(a))
	}
	slices.SortFunc(inv.Containers, func(a, b sdk.Container) int { return strings.Compare(a.Attempt.String(), b.Attempt.String()) })
	for t := range r.tasks {
		inv.Tasks = append(inv.Tasks, t)
	}
	slices.Sort(inv.Tasks)
	return inv, nil
}

func (r *simRuntime) Events(ctx context.Context, _ func(sdk.Attempt)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (r *simRuntime) Stats(context.Context, sdk.Attempt) (sdk.Stats, error) {
	return sdk.Stats{}, sdk.Unsupported
}

func (r *simRuntime) Exec(_ context.Context, q sdk.ExecRequest) (sdk.ExecResult, error) {
	before, after := r.trouble()
	if err := firstOf(before, after); err != nil {
		return sdk.ExecResult{}, err
	}
	if c := r.containers[q.Attempt]; c == nil || c.state != sdk.StateRunning {
		return sdk.ExecResult{}, sdk.NotFound
	}
	if !r.healthy {
		return sdk.ExecResult{ExitCode: 1}, nil
	}
	return sdk.ExecResult{}, nil
}

func (r *simRuntime) Images(context.Context) (sdk.ImageInventory, error) {
	if r.images == nil {
		return sdk.ImageInventory{}, sdk.Unsupported
	}
	before, after := r.trouble()
	if err := firstOf(before, after); err != nil {
		return sdk.ImageInventory{}, err
	}
	inv := sdk.ImageInventory{Disk: r.disk}
	for _, d := range slices.Sorted(maps.Keys(r.images)) {
		inv.Images = append(inv.Images, sdk.StoredImage{Digest: d, References: r.images[d], Bytes: 10, InUse: r.uses(d)})
	}
	return inv, nil
}

func (r *simRuntime) uses(digest string) bool {
	for _, c := range r.containers {
		if c.image == digest {
			return true
		}
	}
	return false
}

func (r *simRuntime) RemoveImage(_ context.Context, digest string) error {
	before, after := r.trouble()
	if before != nil {
		return before
	}
	if r.uses(digest) {
		return sdk.Conflict
	}
	delete(r.images, digest)
	return after
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Runtimes with the one runtime.
func (r *simRuntime) Runtime(string) (sdk.Runtime, error) {
	if r.down {
		return nil, sdk.Unavailable
	}
	return r, nil
}
func (r *simRuntime) RuntimeNames() []string { return []string{defaultRuntime} }
func (r *simRuntime) Changes() <-chan string { return nil }

// simJournal keeps records as a disk would.
type simJournal struct {
	assignments map[string]*wire.Assignment
	records     []Record
	forgotten   map[string]bool
	broken      bool // errors
	liar        bool // errors, after it was written all the same
	everBroken  bool
}

func newSimJournal() *simJournal {
	return &simJournal{assignments: map[string]*wire.Assignment{}, forgotten: map[string]bool{}}
}

func (j *simJournal) err() error {
	if j.broken || j.liar {
		j.everBroken = true
		return fmt.Errorf("no space left on device")
	}
	return nil
}

func (j *simJournal) SaveAssignment(a *wire.Assignment) error {
	if !j.broken {
		j.assignments[a.GetTaskId()] = a
		delete(j.forgotten, a.GetTaskId())
	}
	return j.err()
}

func (j *simJournal) Append(rs ...Record) error {
	if !j.broken {
		j.records = append(j.records, rs...)
	}
	return j.err()
}

func (j *simJournal) ForgetTask(id string) error {
	if !j.broken {
		delete(j.assignments, id)
		j.records = slices.DeleteFunc(j.records, func(r Record) bool { return r.Task == id })
		j.forgotten[id] = true
	}
	return j.err()
}

func (j *simJournal) forgot(task string) bool { return j.forgotten[task] || j.assignments[task] == nil }

func (j *simJournal) recorded(a sdk.Attempt) bool {
	return slices.ContainsFunc(j.records, func(r Record) bool {
		return r.Task == a.Task && r.Attempt != nil && r.Attempt.Container == a.Container && r.Attempt.Number == a.Number
	})
}

func (j *simJournal) exited(a sdk.Attempt) bool {
	return slices.ContainsFunc(j.records, func(r Record) bool {
		return r.Task == a.Task && r.Attempt != nil && r.Attempt.Container == a.Container && r.Attempt.Number == a.Number && r.Attempt.Exited
	})
}

// saved is what opening the journal again would give.
func (j *simJournal) saved() Saved {
	var s Saved
	tasks := map[string]*SavedTask{}
	attempts := map[string]map[string]AttemptRecord{}
	var ids []string
	for id, a := range j.assignments {
		tasks[id] = &SavedTask{Assignment: a}
		attempts[id] = map[string]AttemptRecord{}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, r := range j.records {
		if r.Applied != nil {
			s.Applied = *r.Applied
		}
		if r.Away != nil {
			s.Away = r.Away
		}
		if r.Unused != nil {
			s.Unused = r.Unused
		}
		t := tasks[r.Task]
		if t == nil {
			continue
		}
		switch {
		case r.Desired != nil:
			t.Desired = r.Desired
		case r.Status != nil:
			t.Status = r.Status
		case r.Origin != "":
			t.Origin = r.Origin
		case r.Attempt != nil:
			if attempts[r.Task][r.Attempt.Container].Number <= r.Attempt.Number {
				attempts[r.Task][r.Attempt.Container] = *r.Attempt
			}
		}
	}
	for _, id := range ids {
		for _, r := range attempts[id] {
			tasks[id].Attempts = append(tasks[id].Attempts, r)
		}
		s.Tasks = append(s.Tasks, *tasks[id])
	}
	return s
}

type nowhere struct{}

func (nowhere) Open(sdk.Attempt) (stdout, stderr string, err error) {
	return "/dev/null", "/dev/null", nil
}
func (nowhere) Read(a sdk.Attempt, _ string) (io.ReadCloser, error) { return nil, sdk.NotFound }
func (nowhere) Forget(string) error                                 { return nil }
func (nowhere) Dir(string, string, bool) (string, error)            { return "/tmp", nil }
func (nowhere) Host(string) error                                   { return nil }

// stillClock is a clock that only tests move.
type stillClock struct {
	now  time.Duration
	boot string
}

func (c *stillClock) Now() time.Duration                   { return c.now }
func (c *stillClock) When() *wire.When                     { return &wire.When{BootId: c.boot, BoottimeNs: int64(c.now)} }
func (c *stillClock) BootID() string                       { return c.boot }
func (c *stillClock) After(time.Duration) <-chan time.Time { return nil }
