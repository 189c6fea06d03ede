package agent

import (
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

func assignment(id string) *wire.Assignment {
	return &wire.Assignment{TaskId: id, Desired: Running, Spec: &wire.TaskSpec{Containers: []*wire.Container{essential("main")}}}
}

func applied(t *testing.T, s *State, j Journal, incarnation string, full bool, sequence uint64, set ...*wire.Assignment) {
	t.Helper()
	if err := s.assign(j, incarnation, full, set, sequence, 0); err != nil {
		t.Fatal(err)
	}
}

// A store restored from a backup counts from where it was: what it does not
// name it may have forgotten, and neither "removed" nor absence stops it.
func TestSetOfBeforeStopsNothing(t *testing.T) {
	for name, incarnation := range map[string]string{"same incarnation": "one", "another": "two"} {
		t.Run(name, func(t *testing.T) {
			j := newSimJournal()
			s := newState(Limits{}, "boot", Saved{}, 0, nil)
			applied(t, s, j, "one", true, 9, assignment("a"), assignment("b"))
			applied(t, s, j, incarnation, false, 5)
			applied(t, s, j, incarnation, true, 6, assignment("a"))
			applied(t, s, j, incarnation, false, 6, &wire.Assignment{TaskId: "b", Removed: true, Desired: Stopped})
			if b := s.task("b"); b.unwanted() {
				t.Fatalf("a task that the store has forgotten is to stop: %+v", b.Desired)
			}
			if err := s.assignSettled(j, incarnation, []*wire.Assignment{{TaskId: "a", Desired: Running}}, 7, 0); err != nil {
				t.Fatal(err)
			}
			if s.task("a").unwanted() || !s.task("b").removed() {
				t.Errorf("settled: a %+v, b %+v; want b alone to go", s.task("a").Desired, s.task("b").Desired)
			}
		})
	}
}

// Marks cost no write of their own, and are there wherever one counts.
func TestMarksArePersistedWithWhatReliesOnThem(t *testing.T) {
	j := newSimJournal()
	s := newState(Limits{}, "boot", Saved{}, 0, nil)
	s.mark = Mark{"life", 10}
	applied(t, s, j, "one", true, 1, assignment("a"))
	if s.savedApplied.Mark != s.mark || s.task("a").Assignment.GetMark().GetRevision() != 10 {
		t.Errorf("set applied: %+v is saved with %v", s.savedApplied, s.task("a").Assignment.GetMark())
	}
	s.mark.Revision = 20
	before := len(j.records)
	applied(t, s, j, "one", false, 1)
	if n := len(j.records) - before; n != 0 {
		t.Errorf("a set that says nothing cost %d records", n)
	}
	a := s.task("a")
	a.Status, a.Stop = Stopped, &stopping{CodeUserInitiated, ""}
	reports, _ := s.reports(time.Minute, 0, func() *wire.When { return nil }, func() uint64 { return 1 })
	if len(reports) != 1 {
		t.Fatalf("%d reports", len(reports))
	}
	s.mark.Revision = 30
	s.acked("a", 1)
	if err := s.flush(j, 0, true); err != nil {
		t.Fatal(err)
	}
	if s.savedApplied.Revision != 30 {
		t.Errorf("the acknowledgement of an end is saved with %+v", s.savedApplied)
	}
	s.tellAgain()
	if again, _ := s.reports(time.Minute, 0, func() *wire.When { return nil }, func() uint64 { return 2 }); len(again) != 1 || a.Acked {
		t.Errorf("a restored control plane is told %d statuses, acknowledged %t", len(again), a.Acked)
	}
}

// A set that was cut short left only its assignments.
func TestMarkOfSetCutShort(t *testing.T) {
	of := func(life string, revision uint64) *wire.Assignment {
		a := assignment("a")
		a.Mark = &wire.Mark{Life: life, Revision: revision}
		return a
	}
	for name, tc := range map[string]struct {
		saved Saved
		want  Mark
	}{
		"whole":           {Saved{Applied: Applied{Mark: Mark{"l", 7}}, Tasks: []SavedTask{{Assignment: of("l", 9), Origin: "one"}}}, Mark{"l", 7}},
		"cut short":       {Saved{Applied: Applied{Mark: Mark{"l", 7}}, Tasks: []SavedTask{{Assignment: of("l", 9)}}}, Mark{"l", 9}},
		"log was damaged": {Saved{Tasks: []SavedTask{{Assignment: of("l", 3), Origin: "one"}}}, Mark{"l", 3}},
	} {
		if got := tc.saved.mark(); got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
}

func TestMarksOfASupersededSessionCountForNothing(t *testing.T) {
	a := &Agent{inbox: newInbox()}
	a.Welcomed(Mark{"first", 10}, false)
	if !a.Saw(Mark{"first", 12}) || !a.Saw(Mark{"first", 11}) || a.Mark() != (Mark{"first", 12}) {
		t.Fatalf("mark %+v", a.Mark())
	}
	a.Welcomed(Mark{"second", 5}, true)
	if a.Saw(Mark{"first", 13}) || a.Mark() != (Mark{"second", 5}) {
		t.Errorf("mark %+v", a.Mark())
	}
	if !a.Saw(Mark{}) || !a.inbox.take().reconcile {
		t.Error("a control plane without marks is not heard, or the wish to reconcile is lost")
	}
}
