package state

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

func assign(id string) *wire.Assignment {
	return &wire.Assignment{
		Sequence: 7, TaskId: id, Desired: "RUNNING",
		Spec: &wire.TaskSpec{Family: "web", Containers: []*wire.Container{{Name: "main", Image: "app:1", Essential: true}}},
	}
}

// op is one call on the journal; each returns the single records it is made of.
type op struct {
	name  string
	do    func(*Journal) error
	model []func(*live)
}

func save(id string) op {
	return op{"save " + id, func(j *Journal) error { return j.SaveAssignment(assign(id)) },
		[]func(*live){func(l *live) { l.task(id).assignment = assign(id) }}}
}

func forget(id string) op {
	return op{"forget " + id, func(j *Journal) error { return j.ForgetTask(id) },
		[]func(*live){func(l *live) { delete(l.tasks, id) }}}
}

func records(rs ...agent.Record) op {
	o := op{name: "append", do: func(j *Journal) error { return j.Append(rs...) }}
	for _, r := range rs {
		o.model = append(o.model, func(l *live) { l.apply(entry{Record: r}) })
	}
	return o
}

func compacting() op {
	return op{name: "compact", do: func(j *Journal) error { return j.compact() }}
}

func script() []op {
	code := 3
	return []op{
		save("a"),
		records(agent.Record{Task: "a", Origin: "one"}, agent.Record{Applied: &agent.Applied{Incarnation: "one", Sequence: 1}}),
		records(agent.Record{Task: "a", Attempt: &agent.AttemptRecord{Container: "main", Number: 1, BootID: "b", HostPorts: []int{8080},
			Devices: []agent.DeviceRef{{Plugin: "nvidia", ID: "GPU-1"}}}}),
		records(agent.Record{Away: &agent.Away{BootID: "b", At: 9, For: 7, WallUnixNs: 5}},
			agent.Record{Unused: &agent.Unused{Images: []agent.UnusedImage{{Runtime: "containerd", Digest: "sha256:1", For: 3}}}}),
		save("b"),
		records(agent.Record{Task: "b", Origin: "one"}, agent.Record{Applied: &agent.Applied{Incarnation: "one", Sequence: 2}},
			agent.Record{Task: "a", Status: &agent.StatusRecord{LastStatus: "RUNNING"}}),
		compacting(),
		records(agent.Record{Task: "a", Attempt: &agent.AttemptRecord{Container: "main", Number: 1, Exited: true, ExitCode: &code}}),
		forget("a"),
		save("a"),
		records(agent.Record{Task: "a", Origin: "two"}),
		forget("b"),
		compacting(),
		save("c"),
		records(agent.Record{Task: "c", Desired: &agent.Desired{Status: "STOPPED", Reason: "enough"}}),
	}
}

// states are what may be found after the ops up to n went well and those of
// the next were cut short: nothing of it, or the first few of its records.
func states(ops []op, upTo int, partial bool) []agent.Saved {
	build := func(records int) agent.Saved {
		l := &live{tasks: map[string]*liveTask{}}
		for _, o := range ops[:upTo] {
			for _, m := range o.model {
				m(l)
			}
		}
		for i := range records {
			ops[upTo].model[i](l)
		}
		// A task is one only with its assignment.
		for id, t := range l.tasks {
			if t.assignment == nil {
				delete(l.tasks, id)
			}
		}
		return l.saved()
	}
	out := []agent.Saved{build(0)}
	if partial && upTo < len(ops) {
		for n := range ops[upTo].model {
			out = append(out, build(n+1))
		}
	}
	return out
}

func oneOf(t *testing.T, what string, got agent.Saved, want []agent.Saved) {
	t.Helper()
	var diffs []string
	for _, w := range want {
		d := cmp.Diff(w, got, protocmp.Transform())
		if d == "" {
			return
		}
		diffs = append(diffs, d)
	}
	t.Fatalf("%s: state is none of those it may be; the nearest (-want +got):\n%s", what, strings.Join(diffs, "\n--- or\n"))
}

func TestPowerCutAtEveryOperationLeavesAnAcknowledgedState(t *testing.T) {
	ops := script()
	cuts := 0
	for failAt := 1; ; failAt++ {
		ended := false
		for seed := range 12 {
			disk := newFakeFS()
			for range seed * 7 {
				disk.rng.Uint64()
			}
			j, _, err := open(disk)
			if err != nil {
				t.Fatal(err)
			}
			disk.ops, disk.failAt, disk.mode = 0, failAt, "cut"
			done := 0
			for ; done < len(ops); done++ {
				if ops[done].do(j) != nil {
					break
				}
			}
			if done == len(ops) {
				ended = true
				break
			}
			cuts++
			_, saved, err := open(disk.reboot())
			if err != nil {
				t.Fatalf("cut at operation %d, during %s: open: %v", failAt, ops[done].name, err)
			}
			oneOf(t, fmt.Sprintf("cut at operation %d, during %s, seed %d", failAt, ops[done].name, seed), saved, states(ops, done, true))
		}
		if ended {
			break
		}
	}
	if cuts < 300 {
		t.Fatalf("only %d power cuts were tried", cuts)
	}
}

func TestDiskErrorAtEveryOperationLeavesTheJournalUsable(t *testing.T) {
	ops := script()
	for _, mode := range []string{"full", "broken"} {
		for failAt := 1; ; failAt++ {
			disk := newFakeFS()
			j, _, err := open(disk)
			if err != nil {
				t.Fatal(err)
			}
			disk.ops, disk.failAt, disk.mode = 0, failAt, mode
			failures := 0
			for _, o := range ops {
				if o.do(j) != nil {
					failures++
					if err := o.do(j); err != nil { // as the agent does
						t.Fatalf("%s at operation %d: %s again: %v", mode, failAt, o.name, err)
					}
				}
			}
			if failures > 1 {
				t.Fatalf("%s at operation %d: one failure made %d calls fail", mode, failAt, failures)
			}
			_, saved, err := open(disk.reboot())
			if err != nil {
				t.Fatalf("%s at operation %d: open: %v", mode, failAt, err)
			}
			oneOf(t, fmt.Sprintf("%s at operation %d", mode, failAt), saved, states(ops, len(ops), false))
			if disk.ops < failAt {
				break
			}
		}
	}
}

func TestFullDiskDoesNotStopTheJournalFromOpening(t *testing.T) {
	disk := newFakeFS()
	j, _, err := open(disk)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range script()[:5] {
		if err := o.do(j); err != nil {
			t.Fatal(err)
		}
	}
	log := disk.names[logName]
	log.data = append(log.data, "\x00\x00\x00\x99torn"...)
	want := states(script(), 5, false)
	for failAt := 2; failAt < 6; failAt++ { // 1 makes the tasks' directory
		again := newFakeFS()
		for n, i := range disk.names {
			again.names[n] = &inode{data: append([]byte{}, i.data...), synced: i.data}
		}
		again.failAt, again.mode = failAt, "full"
		j, saved, err := open(again)
		if err != nil {
			t.Fatalf("full at operation %d: %v", failAt, err)
		}
		oneOf(t, "full", saved, want)
		if err := j.Append(agent.Record{Task: "a", Origin: "later"}); err != nil {
			t.Fatalf("append after the disk has room again: %v", err)
		}
	}
}

func TestDamageIsSetAsideAndReported(t *testing.T) {
	fill := func(t *testing.T) string {
		dir := t.TempDir()
		j, saved, err := Open(dir)
		if err != nil || len(saved.Tasks) != 0 {
			t.Fatal(saved, err)
		}
		for _, o := range script()[:5] {
			if err := o.do(j); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	flip := func(t *testing.T, path string, at int) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[at] ^= 0x40
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name     string
		damage   func(t *testing.T, dir string)
		problems int
		tasks    int
	}{
		{"none", func(*testing.T, string) {}, 0, 2},
		{"assignment", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "tasks/a/assignment"), 20) }, 1, 1},
		{"assignment missing", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "tasks/a/assignment")); err != nil {
				t.Fatal(err)
			}
		}, 1, 1},
		{"log record", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 20) }, 1, 2},
		{"log length", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 8) }, 1, 2},
		{"log magic", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 0) }, 1, 2},
		{"torn tail", func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, "log"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "log"), b[:len(b)-5], 0o600); err != nil {
				t.Fatal(err)
			}
		}, 0, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := fill(t)
			tc.damage(t, dir)
			for round := range 2 {
				j, saved, err := Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				want := tc.problems
				if round == 1 {
					want = 0 // reported once, then dealt with
				}
				if len(saved.Problems) != want {
					t.Errorf("round %d: problems %q, want %d", round, saved.Problems, want)
				}
				if len(saved.Tasks) != tc.tasks {
					t.Errorf("round %d: %d tasks, want %d", round, len(saved.Tasks), tc.tasks)
				}
				if err := j.Close(); err != nil {
					t.Fatal(err)
				}
			}
			kept, _ := os.ReadDir(filepath.Join(dir, "damaged"))
			if tc.problems > 0 && len(kept) == 0 && tc.name != "assignment missing" {
				t.Error("nothing was set aside")
			}
		})
	}
}

func TestSecondAgentOnOneDirectoryIsToldWhoHasIt(t *testing.T) {
	dir := t.TempDir()
	j, _, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = Open(dir)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Fatalf("second Open: %v, want an error with process id %d", err, os.Getpid())
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	again, _, err := Open(dir)
	if err != nil {
		t.Fatalf("Open after Close: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestNewerFormats(t *testing.T) {
	b, err := encodeAssignment(assign("a"))
	if err != nil {
		t.Fatal(err)
	}
	b[7] = schema + 1
	if _, err := decodeAssignment(b); err != nil {
		t.Errorf("one version ahead: %v", err)
	}
	b[7] = schema + 2
	if _, err := decodeAssignment(b); err == nil || !strings.Contains(err.Error(), "newer agent") {
		t.Errorf("two versions ahead: %v", err)
	}
	dir := t.TempDir()
	log := newLog()
	log[7] = schema + 2
	if err := os.WriteFile(filepath.Join(dir, "log"), log, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "newer agent") {
		t.Errorf("log two versions ahead: %v", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || !cmp.Equal(log, after) {
		t.Errorf("the newer log was touched: %v", err)
	}
}

func TestLogIsCompactedPastItsSize(t *testing.T) {
	disk := newFakeFS()
	j, _, err := open(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.SaveAssignment(assign("a")); err != nil {
		t.Fatal(err)
	}
	for n := range 5000 {
		if err := j.Append(agent.Record{Task: "a", Attempt: &agent.AttemptRecord{Container: "main", Number: n + 1, BootID: "b"}}); err != nil {
			t.Fatal(err)
		}
	}
	if size := len(disk.names[logName].data); size > compactPast+1024 {
		t.Errorf("the log has %d bytes", size)
	}
	_, saved, err := open(disk)
	if err != nil || len(saved.Tasks) != 1 || saved.Tasks[0].Attempts[0].Number != 5000 {
		t.Errorf("after compaction: %+v, %v", saved, err)
	}
}

func FuzzDecodeAssignment(f *testing.F) {
	b, err := encodeAssignment(assign("a"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add([]byte(assignmentMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := decodeAssignment(b)
		if err != nil {
			return
		}
		again, err := encodeAssignment(a)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeAssignment(again)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(a, back, protocmp.Transform()); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzReplayLog(f *testing.F) {
	b := newLog()
	for _, r := range []agent.Record{
		{Task: "a", Origin: "one"},
		{Applied: &agent.Applied{Incarnation: "one", Sequence: 2}},
		{Task: "a", Attempt: &agent.AttemptRecord{Container: "main", Number: 1}},
	} {
		var err error
		if b, err = appendFrame(b, entry{Record: r}); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(b)
	f.Add(b[:len(b)-4])
	f.Add(append(append([]byte{}, b[:20]...), b[21:]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		disk := newFakeFS()
		disk.names[logName] = &inode{data: b}
		j, saved, err := open(disk)
		if err != nil {
			return
		}
		if err := j.Append(agent.Record{Applied: &agent.Applied{Incarnation: "x", Sequence: 9}}); err != nil {
			t.Fatal(err)
		}
		_, again, err := open(disk)
		if err != nil {
			t.Fatal(err)
		}
		if len(again.Problems) > 0 {
			t.Fatalf("opened once, it is still damaged: %q (before: %q)", again.Problems, saved.Problems)
		}
		if again.Applied.Sequence != 9 {
			t.Fatalf("what was appended is not there: %+v", again.Applied)
		}
	})
}
