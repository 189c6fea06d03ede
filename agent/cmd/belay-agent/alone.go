package main

import (
	"fmt"
	"path/filepath"

	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/controlplane/wire"
)

// A device whose identity is gone or damaged still has tasks that somebody
// relies on: its agent runs without a control plane until it is enrolled anew.

// nobody is the agent's uplink then.
type nobody struct{}

func (nobody) TaskStatus(*wire.TaskStatus)   {}
func (nobody) AckAssignments(string, uint64) {}

// holdsTasks tells whether the device was enrolled once, whatever became of
// its identity.
func holdsTasks(stateDir string) bool {
	tasks, _ := filepath.Glob(filepath.Join(stateDir, "tasks", "*"))
	return len(tasks) > 0
}

func enrolAnew(stateDir string) string {
	return fmt.Sprintf("restore %s from a copy and restart the agent; or stop the agent, enrol anew with \"belay-agent enroll --force\" and start it: then it is a new instance, and the tasks of the old one end",
		filepath.Join(stateDir, "identity"))
}

func (d *device) setFacts(f *wire.Facts) {
	if d.link != nil {
		d.link.SetFacts(f)
	}
}

func (d *device) linkStatus() link.Status {
	if d.link == nil {
		return link.Status{LastError: d.alone.Error()}
	}
	return d.link.Status()
}
