package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// A reboot in the middle of a start left a snapshot behind that no List tells
// of: the attempt is removed before the next one, seen or not.
func TestAStartThatARebootCutShortIsCleanedUp(t *testing.T) {
	spec := &wire.TaskSpec{Containers: []*wire.Container{essential("main")}}
	s := newState(Limits{}, "boot", Saved{Tasks: []SavedTask{{Assignment: running(spec), Attempts: []AttemptRecord{
		{Container: "main", Number: 1, BootID: "earlier"},
	}}}}, 0, nil)
	j := s.begin(action{Verb: callList, Runtime: defaultRuntime})
	s.finish(result{job: j, info: sdk.RuntimeInfo{Images: true}}, time.Second)
	calls, _, err := s.step(newSimJournal(), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	first := sdk.Attempt{Task: id(1), Container: "main", Number: 1}
	if !slices.ContainsFunc(calls, func(a action) bool { return a.Verb == callRemove && a.Attempt == first }) {
		t.Errorf("attempt 1 is not removed: %+v", calls)
	}
}
