package faults

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// bugKey names the only bug to look for.
const bugKey = "BELAY_BUG"

// bugs are planted one at a time in binaries built with -tags belay_bug; the
// code says bug("name") where each of them is.
var bugs = []struct{ name, what string }{
	{"skip-persist", "the agent's log is not written"},
	{"double-start", "a container found running is not adopted: the next attempt is started"},
	{"lost-ack", "a last status counts as acknowledged when it is sent"},
	{"early-clean-up", "a container's network is taken away before the container is gone"},
	{"status-back", "a task whose container is to be restarted is told of as PENDING"},
	{"partial-set", "absence from a partial set stops a task"},
	{"orphan-kill", "containers of unknown tasks are ended although saved state was damaged"},
	{"exit-forgotten", "that an attempt has ended is not written"},
	{"reboot-unseen", "an exit that a reboot brought counts as the container's own"},
	{"leaked-netns", "a container's network namespace and address are never given back"},
	{"leaked-goroutine", "each session with the control plane leaves a goroutine behind"},
}

// TestTeeth runs the campaign on binaries with a bug until it is found.
func TestTeeth(t *testing.T) {
	bin := os.Getenv("BELAY_BUG_BIN")
	if bin == "" {
		t.Skip("takes minutes: run make faults-teeth")
	}
	for _, b := range bugs {
		if only := os.Getenv(bugKey); only != "" && only != b.name {
			continue
		}
		t.Run(b.name, func(t *testing.T) {
			c := Campaign{Bin: rig.Binaries(bin), Seed: *seedFlag, Runs: *runsFlag, Whole: 3, Bug: b.name, Log: func(f string, args ...any) {
				fmt.Printf("    "+f+"\n", args...)
			}}
			rep, err := c.Run(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if len(rep.Violations) == 0 {
				t.Fatalf("not found in %d runs: %s", rep.Runs, b.what)
			}
			fmt.Printf("%-18s found in run %d of seed %d, after %d faults: %s\n", b.name, rep.Runs-1, c.Seed, rep.faults(), rep.Violations[0])
			for _, dir := range rep.Kept {
				if err := os.RemoveAll(dir); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
