package containerd

import (
	"os"
	"testing"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestRunTime(t *testing.T) {
	const years = 50 * 365 * 24 * time.Hour
	start := time.Unix(40, 0) // a board without a clock
	at := func(ran, set time.Duration) time.Time { return start.Add(ran + set) }
	for _, c := range []struct {
		name        string
		exited, now time.Time
		ago, want   time.Duration
	}{
		{"nobody set the clock", at(5*time.Second, 0), at(time.Hour, 0), time.Hour, 5 * time.Second},
		{"a time service set it while it ran", at(5*time.Second, years), at(time.Hour, years), time.Hour, 5 * time.Second},
		{"and after it ended", at(5*time.Second, 0), at(time.Hour, years), time.Hour, 5 * time.Second},
		{"set back while it ran", at(5*time.Second, -years), at(time.Hour, -years), time.Hour, 5 * time.Second},
		{"set back after it ended", at(5*time.Second, 0), at(time.Hour, -years), time.Hour, 5 * time.Second},
		{"set by little", at(5*time.Second, 300*time.Millisecond), at(time.Hour, 300*time.Millisecond), time.Hour, 5*time.Second + 300*time.Millisecond},
		{"set by a minute while it ran: the less of two that can be", at(5*time.Minute, time.Minute), at(time.Hour, time.Minute), time.Hour, 5 * time.Minute},
		{"set twice: nothing can be", at(5*time.Second, years), at(time.Hour, 0), time.Hour, 0},
		{"no time at all", at(0, 0), at(time.Hour, 0), time.Hour, 0},
	} {
		if got := runTime(start, c.exited, c.now, c.ago); got != c.want {
			t.Errorf("%s: ran for %s, want %s", c.name, got, c.want)
		}
	}
}

// What is marked as started tells from when it ran.
func TestRanSinceItsMark(t *testing.T) {
	r := &Runtime{runDir: t.TempDir()}
	const id = "c"
	end := func(after time.Duration) *tasktypes.Process {
		return &tasktypes.Process{ExitedAt: timestamppb.New(time.Now().Add(after))}
	}
	if got := r.ran(id, end(0)); got != 0 {
		t.Errorf("never started, and ran for %s", got)
	}
	if err := os.MkdirAll(r.containerDir(id), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := r.mark(id, "started"); err != nil {
		t.Fatal(err)
	}
	if got := r.ran(id, end(500*time.Millisecond)); got < 400*time.Millisecond || got > 600*time.Millisecond {
		t.Errorf("ran for %s, want half a second", got)
	}
	if got := r.ran(id, &tasktypes.Process{}); got != 0 {
		t.Errorf("nobody knows when it ended, and it ran for %s", got)
	}
}
