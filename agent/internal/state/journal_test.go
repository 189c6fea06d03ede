package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

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

// states are what may be found after the ops up to n went well and the next
// was cut short: nothing of it, or all.
func states(ops []op, upTo int, partial bool) []agent.Saved {
	build := func(upTo int) agent.Saved {
		l := newLive()
		for _, o := range ops[:upTo] {
			for _, m := range o.model {
				m(l)
			}
		}
		return l.saved()
	}
	out := []agent.Saved{build(upTo)}
	if partial && upTo < len(ops) {
		out = append(out, build(upTo+1))
	}
	return out
}

func oneOf(t rapid.TB, what string, got agent.Saved, want []agent.Saved) {
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
	for cutAt := 1; ; cutAt++ {
		disk := newSimDisk()
		disk.cutAt = cutAt
		j, _, err := open(disk)
		done := 0
		for ; err == nil && done < len(ops); done++ {
			if ops[done].do(j) != nil {
				break
			}
		}
		if !disk.off {
			break
		}
		for seed := range uint64(16) {
			cuts++
			_, saved, err := open(disk.reboot(seed))
			if err != nil {
				t.Fatalf("cut at operation %d: open: %v", cutAt, err)
			}
			oneOf(t, fmt.Sprintf("cut at operation %d, after %d calls, seed %d", cutAt, done, seed), saved, states(ops, done, true))
		}
	}
	if cuts < 1200 {
		t.Fatalf("only %d power cuts were tried", cuts)
	}
}

// Anything is drawn: what is written, which operations fail and how, when power
// goes, again and again, and what the disk then has.
func TestNothingAcknowledgedIsLostAndNothingIsHalfThere(t *testing.T) {
	reached := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		ops := drawOps(t)
		disk := newSimDisk()
		disk.garbage = rapid.Bool().Draw(t, "garbage")
		done := 0
		for life := range rapid.IntRange(1, 4).Draw(t, "lives") {
			disk.ops, disk.cutAt = 0, rapid.IntRange(1, 120).Draw(t, "cut at")
			killed := rapid.IntRange(0, 3).Draw(t, "killed") == 0 // the agent, and the disk goes on
			for range rapid.IntRange(0, 4).Draw(t, "faults") {
				if killed {
					break
				}
				disk.faults[rapid.IntRange(1, 100).Draw(t, "fault at")] =
					rapid.SampledFrom([]syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS}).Draw(t, "fault")
			}
			j, saved, err := open(disk)
			if err != nil {
				t.Fatalf("life %d: open: %v", life, err)
			}
			if !disk.off && len(saved.Problems) > 0 && !disk.garbage {
				t.Fatalf("life %d: what power left is called damage: %q", life, saved.Problems)
			}
			for ; done < len(ops); done++ {
				err := ops[done].do(j)
				for try := 0; err != nil && !disk.off && try < 20; try++ {
					reached["retried after a fault"]++
					err = ops[done].do(j) // as the agent does
				}
				if disk.off {
					break
				}
				if err != nil {
					t.Fatalf("life %d: %s still fails: %v", life, ops[done].name, err)
				}
			}
			upTo := done
			if killed {
				disk.off, disk.cutAt = false, 0
			} else {
				disk = disk.reboot(rapid.Uint64().Draw(t, "what is left"))
			}
			// Reading it must need no working disk.
			disk.stuck = rapid.SampledFrom([]syscall.Errno{0, 0, syscall.EROFS, syscall.ENOSPC}).Draw(t, "stuck")
			_, saved, err = open(disk)
			if err != nil {
				t.Fatalf("life %d: open after the cut: %v", life, err)
			}
			if (saved.Unwritable != "") && disk.stuck == 0 {
				t.Fatalf("a disk in order cannot be written: %s", saved.Unwritable)
			}
			disk.stuck = 0
			saved.Problems, saved.Unwritable = nil, ""
			oneOf(t, fmt.Sprintf("life %d, after %d calls", life, upTo), saved, states(ops, upTo, true))
			if killed {
				reached["kills"]++
			} else {
				reached["power cuts"]++
			}
		}
	})
	for what, n := range reached {
		t.Logf("%s: %d", what, n)
	}
}

func drawOps(t *rapid.T) []op {
	ids := []string{"a", "b", "c"}
	held := map[string]bool{}
	var ops []op
	for range rapid.IntRange(1, 25).Draw(t, "calls") {
		id := rapid.SampledFrom(ids).Draw(t, "task")
		kind := rapid.IntRange(0, 9).Draw(t, "call")
		switch {
		case !held[id]:
			ops = append(ops, save(id))
			held[id] = true
		case kind == 0:
			ops = append(ops, forget(id))
			held[id] = false
		case kind == 1:
			ops = append(ops, compacting())
		case kind == 2:
			ops = append(ops, save(id))
		default:
			var rs []agent.Record
			for range rapid.IntRange(1, 4).Draw(t, "records") {
				rs = append(rs, drawRecord(t, id, len(ops)))
			}
			ops = append(ops, records(rs...))
		}
	}
	return ops
}

func drawRecord(t *rapid.T, id string, n int) agent.Record {
	switch rapid.IntRange(0, 5).Draw(t, "record") {
	case 0:
		return agent.Record{Applied: &agent.Applied{Incarnation: "one", Sequence: uint64(n)}}
	case 1:
		return agent.Record{Task: id, Origin: fmt.Sprint("o", n)}
	case 2:
		return agent.Record{Task: id, Desired: &agent.Desired{Status: "STOPPED", Reason: fmt.Sprint(n)}}
	case 3:
		return agent.Record{Task: id, Status: &agent.StatusRecord{LastStatus: "RUNNING", Reason: fmt.Sprint(n)}}
	}
	// Past a sector, so that it can tear.
	return agent.Record{Task: id, Attempt: &agent.AttemptRecord{
		Container: rapid.SampledFrom([]string{"main", "side"}).Draw(t, "container"), Number: n, BootID: "b",
		Reason: strings.Repeat("x", rapid.IntRange(0, 900).Draw(t, "size")),
	}}
}

func TestDiskErrorAtEveryOperationLeavesTheJournalUsable(t *testing.T) {
	ops := script()
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS} {
		for failAt := 1; ; failAt++ {
			disk := newSimDisk()
			disk.faults[failAt] = errno
			j, _, err := open(disk)
			if err != nil {
				t.Fatal(err)
			}
			failures := 0
			for _, o := range ops {
				if o.do(j) != nil {
					failures++
					if err := o.do(j); err != nil { // as the agent does
						t.Fatalf("%v at operation %d: %s again: %v", errno, failAt, o.name, err)
					}
				}
			}
			if failures > 1 {
				t.Fatalf("%v at operation %d: one failure made %d calls fail", errno, failAt, failures)
			}
			for seed := range uint64(8) {
				_, saved, err := open(disk.reboot(seed))
				if err != nil {
					t.Fatalf("%v at operation %d: open: %v", errno, failAt, err)
				}
				oneOf(t, fmt.Sprintf("%v at operation %d", errno, failAt), saved, states(ops, len(ops), false))
			}
			if disk.ops < failAt {
				break
			}
		}
	}
}

// A disk that stops working anywhere, and stays so, lets the journal be opened,
// is acknowledged nothing, and goes on once it works again.
func TestDiskThatStopsWorkingAndComesBack(t *testing.T) {
	ops := script()
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS} {
		for stop := range ops {
			disk := newSimDisk()
			j, _, err := open(disk)
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range ops[:stop] {
				if err := o.do(j); err != nil {
					t.Fatal(err)
				}
			}
			disk.stuck = errno
			if err := ops[stop].do(j); err == nil {
				t.Fatalf("%v: %s was acknowledged", errno, ops[stop].name)
			}
			if err := j.Append(); err == nil {
				t.Fatalf("%v: the log is said to be writable", errno)
			}
			again := disk.reboot(uint64(stop))
			again.stuck = errno
			j, saved, err := open(again)
			if err != nil {
				t.Fatalf("%v: open: %v", errno, err)
			}
			if saved.Unwritable == "" && (saved.Problems != nil || j.Append() == nil) {
				t.Fatalf("%v before %s: not said to be unwritable: %+v", errno, ops[stop].name, saved)
			}
			saved.Unwritable = ""
			oneOf(t, errno.Error(), saved, states(ops, stop, true))
			again.stuck = 0
			if err := j.Append(); err != nil {
				t.Fatalf("the disk works again: %v", err)
			}
			for _, o := range ops[stop:] {
				if err := o.do(j); err != nil {
					t.Fatalf("the disk works again: %s: %v", o.name, err)
				}
			}
			_, saved, err = open(again.reboot(1))
			if err != nil {
				t.Fatal(err)
			}
			oneOf(t, "after the disk came back", saved, states(ops, len(ops), false))
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
		for _, o := range script()[:6] {
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
		lost     int  // tasks without their assignment
		aside    bool // a copy is kept
		stays    bool // each start finds it, until the assignment is sent again
	}{
		{"none", func(*testing.T, string) {}, 0, 0, false, false},
		{"assignment", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "tasks/a/assignment"), 20) }, 1, 1, true, true},
		{"assignment's version", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "tasks/a/assignment"), 7) }, 1, 0, true, false},
		{"assignment's length", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "tasks/a/assignment"), 14) }, 1, 0, true, false},
		{"assignment missing", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "tasks/a/assignment")) }, 1, 1, false, true},
		{"task's directory missing", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "tasks/a")) }, 1, 1, false, true},
		{"all tasks missing", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "tasks")) }, 2, 2, false, true},
		{"a file in place of a task", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "tasks/a"))
			put(t, filepath.Join(dir, "tasks/a"), "?")
		}, 1, 1, false, true},
		{"a directory in place of an assignment", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "tasks/a/assignment"))
			if err := os.MkdirAll(filepath.Join(dir, "tasks/a/assignment/x"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, 1, 1, false, true},
		{"somebody's file among the tasks", func(t *testing.T, dir string) { put(t, filepath.Join(dir, "tasks/lost+found"), "?") }, 0, 0, false, false},
		{"log record", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 40) }, 1, 0, true, true},
		{"log length", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 8) }, 1, 0, true, true},
		{"log magic", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 0) }, 1, 0, true, true},
		{"log version", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "log"), 7) }, 1, 0, true, true},
		{"log a directory", func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "log"))
			put(t, filepath.Join(dir, "log/x"), "?")
		}, 1, 0, true, true},
		{"torn tail", func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, "log"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "log"), b[:len(b)-5], 0o600); err != nil {
				t.Fatal(err)
			}
		}, 0, 0, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := fill(t)
			tc.damage(t, dir)
			for round := range 3 {
				j, saved, err := Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				want := tc.problems
				if round > 0 && !tc.stays {
					want = 0
				}
				if len(saved.Problems) != want {
					t.Errorf("round %d: problems %q, want %d", round, saved.Problems, want)
				}
				lost := 0
				for _, st := range saved.Tasks {
					if st.Assignment == nil {
						if lost++; st.ID == "" {
							t.Error("a lost task has no id")
						}
					}
				}
				if len(saved.Tasks) != 2 || lost != tc.lost {
					t.Errorf("round %d: %d tasks, %d lost, want 2 and %d: %+v", round, len(saved.Tasks), lost, tc.lost, saved)
				}
				if err := j.Close(); err != nil {
					t.Fatal(err)
				}
			}
			kept, _ := os.ReadDir(filepath.Join(dir, "damaged"))
			if (len(kept) == 1) != tc.aside {
				t.Errorf("set aside: %v", kept)
			}
			// The control plane sends everything again.
			j, _, err := Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{"a", "b"} {
				if err := j.SaveAssignment(assign(id)); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(j.Append(agent.Record{Doubt: &agent.Doubt{Cleared: true}}), j.Close()); err != nil {
				t.Fatal(err)
			}
			j, saved, err := Open(dir)
			if err != nil || len(saved.Problems) > 0 || len(saved.Tasks) != 2 || saved.Tasks[0].Assignment == nil {
				t.Errorf("sent again: %+v, %v", saved, err)
			}
			if tc.lost > 0 && tc.name != "all tasks missing" && len(saved.Tasks[0].Attempts) != 1 {
				t.Errorf("what the log knew of the task is gone: %+v", saved.Tasks[0])
			}
			if err := errors.Join(j.ForgetTask("a"), j.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
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
	log := binary.BigEndian.AppendUint32([]byte(logMagic), schema+2)
	log, err = appendFrame(log, entry{Schema: schema + 2})
	if err != nil {
		t.Fatal(err)
	}
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
	disk := newSimDisk()
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
	if b, err := disk.read(logName); err != nil || len(b) > compactPast+1024 {
		t.Errorf("the log has %d bytes, %v", len(b), err)
	}
	_, saved, err := open(disk)
	if err != nil || len(saved.Tasks) != 1 || saved.Tasks[0].Attempts[0].Number != 5000 {
		t.Errorf("after compaction: %+v, %v", saved, err)
	}
}
