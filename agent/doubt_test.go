package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

func started(t *testing.T, s *State, j Journal, now time.Duration) []string {
	t.Helper()
	acts, _, err := s.step(j, now)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range acts {
		if a.Verb == callPull || a.Verb == callStart {
			out = append(out, a.Attempt.Task)
		}
	}
	return out
}

// A task that may have run and ended, for all that damage left on record, is
// not started again before the control plane has named it; a service's is.
func TestDamageStartsNothingTwice(t *testing.T) {
	spec := func(service bool) *wire.TaskSpec {
		return &wire.TaskSpec{RestartInPlace: service, Containers: []*wire.Container{essential("main")}}
	}
	job := &wire.Assignment{TaskId: "job", Spec: spec(false), Desired: "RUNNING"}
	web := &wire.Assignment{TaskId: "web", Spec: spec(true), Desired: "RUNNING"}
	known := &wire.Assignment{TaskId: "known", Spec: spec(false), Desired: "RUNNING"}
	j := newSimJournal()
	s := newState(Limits{PullGiveUp: 5 * time.Minute}, "boot", Saved{
		Problems: []string{"the log is damaged"},
		Tasks:    []SavedTask{{Assignment: job}, {Assignment: known, Origin: "one"}, {Assignment: web}},
	}, time.Minute, func() float64 { return 0.5 })
	rt := s.runtime(defaultRuntime)
	rt.known, rt.info, rt.listAt = true, sdk.RuntimeInfo{Images: true}, time.Hour
	for _, task := range s.Tasks {
		task.prepared = true
		task.Containers[0].Phase = phaseNone
		task.Containers[0].Image, task.Containers[0].Digest = "image", "sha256:1"
	}
	if got := started(t, s, j, time.Minute); !slices.Equal(got, []string{"known", "web"}) {
		t.Errorf("started %v", got)
	}
	if note := s.note(s.task("job")); note == "" {
		t.Error("nothing says why it waits")
	}
	// Another control plane's word ends no doubt, but names what it names.
	if err := s.assign(j, "two", true, []*wire.Assignment{web}, 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	if s.trusted || s.task("job").unsure == false || s.task("known").unwanted() {
		t.Error("a control plane that is not the one on record was believed")
	}
	if err := s.assign(j, "two", true, []*wire.Assignment{web, job}, 2, time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := started(t, s, j, time.Minute); !slices.Contains(got, "job") {
		t.Errorf("named, and not started: %v", got)
	}
}

// A task whose assignment is lost keeps what else is known of it: one that has
// ended stays so when it is sent again, and one not sent again is forgotten.
func TestLostAssignmentIsSentAgain(t *testing.T) {
	code := 0
	ended := &wire.Assignment{TaskId: "ended", Desired: "RUNNING", Spec: &wire.TaskSpec{Containers: []*wire.Container{essential("main")}}}
	j := newSimJournal()
	for _, id := range []string{"ended", "gone"} {
		j.assignments[id], j.lost[id] = ended, true
	}
	s := newState(Limits{PullGiveUp: 5 * time.Minute, KeepStopped: time.Hour, KeepStoppedTasks: 10}, "boot", Saved{
		Applied:  Applied{Incarnation: "one", Sequence: 4},
		Problems: []string{"the assignment of task ended is damaged", "the assignment of task gone is damaged"},
		Tasks: []SavedTask{{
			ID: "ended", Origin: "one", Status: &StatusRecord{LastStatus: Stopped, StopCode: CodeEssentialExited},
			Attempts: []AttemptRecord{{Container: "main", Number: 1, BootID: "boot", Started: true, Exited: true, ExitCode: &code, Removed: true}},
		}, {ID: "gone", Origin: "one"}},
	}, time.Minute, func() float64 { return 0.5 })
	rt := s.runtime(defaultRuntime)
	rt.known, rt.info, rt.listAt = true, sdk.RuntimeInfo{Images: true}, time.Hour
	rt.strays[sdk.Attempt{Task: "gone", Container: "main", Number: 1}] = &stray{seen: sdk.Container{State: sdk.StateRunning}}
	halts := func() (n int) {
		acts, _ := plan(s, time.Minute)
		for _, a := range acts {
			if a.Verb == callHalt {
				n++
			}
		}
		return n
	}
	if halts() > 0 {
		t.Error("the container of a lost task was taken for an orphan")
	}
	for range 2 { // a control plane restored from an older backup
		if err := s.assign(j, "two", true, nil, 9, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if halts() > 0 || s.trusted || len(s.mislaid) != 2 {
		t.Error("the word of another incarnation ended what it does not know")
	}
	if err := s.assign(j, "one", true, []*wire.Assignment{ended}, 5, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := s.assign(j, "one", true, []*wire.Assignment{ended}, 5, time.Minute); err != nil {
		t.Fatal(err)
	}
	if task := s.task("ended"); task == nil || task.Status != Stopped {
		t.Fatalf("sent again: %+v", task)
	}
	if got := started(t, s, j, time.Minute); len(got) > 0 {
		t.Errorf("started again: %v", got)
	}
	if halts() != 1 || !j.forgotten["gone"] || j.forgotten["ended"] {
		t.Errorf("what nobody wants any more is still kept: %d halts, forgotten %v", halts(), j.forgotten)
	}
	if !slices.ContainsFunc(j.records, func(r Record) bool { return r.Doubt != nil && r.Doubt.Cleared }) || len(s.Problems) > 0 {
		t.Errorf("the doubt lasts: %q", s.Problems)
	}
}
