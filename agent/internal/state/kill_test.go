package state

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/agent"
)

// step is the nth of calls without end: a task is saved, lives and is forgotten.
func step(n int) op {
	id := fmt.Sprint("t", n/8%3)
	switch n % 8 {
	case 0:
		return save(id)
	case 6:
		return compacting()
	case 7:
		return forget(id)
	}
	return records(
		agent.Record{Applied: &agent.Applied{Incarnation: "one", Sequence: uint64(n)}},
		agent.Record{Task: id, Status: &agent.StatusRecord{LastStatus: "RUNNING", Reason: fmt.Sprint(n)}},
		agent.Record{Task: id, Attempt: &agent.AttemptRecord{Container: "main", Number: n, BootID: "b"}},
	)
}

const victimDir = "BELAY_TEST_STATE_VICTIM"

// TestVictim is the process that gets killed: it makes calls from the number in
// its environment on, and writes the number of each that was acknowledged.
func TestVictim(t *testing.T) {
	dir := os.Getenv(victimDir)
	if dir == "" {
		t.Skip("it is run by TestKilledAtAnyInstant")
	}
	j, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	from, _ := strconv.Atoi(os.Getenv(victimDir + "_FROM"))
	for n := from; ; n++ {
		if err := step(n).do(j); err != nil {
			t.Fatal(n, err)
		}
		fmt.Println("done", n)
	}
}

func TestKilledAtAnyInstant(t *testing.T) {
	dir := t.TempDir()
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	model := newLive()
	next := 0
	for round := range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^TestVictim$", "-test.v")
		cmd.Env = append(os.Environ(), victimDir+"="+dir, fmt.Sprintf("%s_FROM=%d", victimDir, next))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var kill *time.Timer
		for lines.Scan() {
			var n int
			if _, err := fmt.Sscanf(lines.Text(), "done %d", &n); err != nil {
				continue
			}
			if kill == nil { // from the first on, at any instant
				kill = time.AfterFunc(time.Duration(rand.Int64N(int64(40*time.Millisecond))), func() { _ = cmd.Process.Kill() })
			}
			if n != next {
				t.Fatalf("round %d: %d acknowledged, expected %d", round, n, next)
			}
			for _, m := range step(n).model {
				m(model)
			}
			next++
		}
		_ = cmd.Wait()
		j, saved, err := Open(dir)
		if err != nil || len(saved.Problems) > 0 || saved.Unwritable != "" {
			t.Fatalf("round %d, killed after %d: %v, %+v", round, next, err, saved)
		}
		states := []agent.Saved{model.saved()}
		for _, m := range step(next).model { // the call under way may have happened
			m(model)
		}
		states = append(states, model.saved())
		oneOf(t, fmt.Sprintf("round %d, killed after %d", round, next), saved, states)
		if err := errors.Join(step(next).do(j), j.Close()); err != nil {
			t.Fatal(err)
		}
		next++
	}
	t.Logf("%d calls acknowledged, %d kills", next, rounds)
}

// On a full disk there is room for what the agent has to write down about tasks
// it holds, and none for new ones.
func TestFullDiskHasRoomForRecords(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mounting a small file system needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	j, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.SaveAssignment(assign("a")); err != nil {
		t.Fatal(err)
	}
	balloon := filepath.Join(dir, "balloon")
	if err := os.WriteFile(balloon, make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	if err := j.SaveAssignment(assign("b")); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a new assignment: %v", err)
	}
	for n := range 100 {
		if err := j.Append(agent.Record{Task: "a", Attempt: &agent.AttemptRecord{Container: "main", Number: n + 1, BootID: "b"}}); err != nil {
			t.Fatalf("record %d on a full disk: %v", n, err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, saved, err := Open(dir)
	if err != nil || len(saved.Tasks) != 1 || saved.Tasks[0].Attempts[0].Number != 100 || saved.Unwritable != "" {
		t.Fatalf("opened on a full disk: %+v, %v", saved, err)
	}
	if err := os.Remove(balloon); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(j.SaveAssignment(assign("b")), j.Close()); err != nil {
		t.Fatal(err)
	}
}
