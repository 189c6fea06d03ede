package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// What a start or a removal leaves when it is cut short, such as a snapshot or
// a shim, no List tells of: the attempt is removed, listed or not.
func TestWhatWasCutShortIsRemovedThoughNoListTells(t *testing.T) {
	code := 0
	for name, saved := range map[string]AttemptRecord{
		"a start, by a reboot":     {Container: "main", Number: 1, BootID: "earlier"},
		"a removal, by the plugin": {Container: "main", Number: 1, BootID: "boot", Started: true, Exited: true, ExitCode: &code},
	} {
		t.Run(name, func(t *testing.T) {
			spec := &wire.TaskSpec{Containers: []*wire.Container{essential("main"), essential("other")}}
			s := newState(Limits{}, "boot", Saved{Tasks: []SavedTask{{Assignment: running(spec), Attempts: []AttemptRecord{saved}}}}, 0, nil)
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
		})
	}
}
