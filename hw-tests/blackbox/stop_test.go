package blackbox

import (
	"path/filepath"
	"testing"
	"time"
)

// TestStopTimeoutRunsOnWithoutTheAgent: what was granted to a container to end
// is not granted again because the agent was killed meanwhile.
func TestStopTimeoutRunsOnWithoutTheAgent(t *testing.T) {
	const timeout = 20 * time.Second
	s := newSite(t, "process")
	signalled := filepath.Join(s.dir, "signalled")
	task := s.run(t, "stubborn", container{"name": "c", "stopTimeout": int(timeout / time.Second),
		"script": "trap 'echo told >> " + signalled + "' TERM; while :; do sleep 0.1; done"})
	if _, err := s.cli.Run(deadline(t, patience), "task", "stop", task.ID); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	moment(timeout / 2)
	s.agent.Kill()
	if err := s.agent.Restart(); err != nil {
		t.Fatal(err)
	}
	end := s.await(t, task.ID, "the task to stop", patience, stopped)
	took := time.Since(began)
	t.Logf("it took %s of %s", took.Round(100*time.Millisecond), timeout)
	if took < timeout || took > timeout+timeout/2-time.Second {
		t.Errorf("it took %s, it was granted %s", took, timeout)
	}
	if code := end.Container("c").ExitCode; code == nil || *code != 137 {
		t.Errorf("it ended with %+v", end)
	}
}
