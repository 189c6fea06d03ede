package state

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/belay-edge/belay/agent"
)

const (
	webTask = "11111111111111111111111111111111"
	jobTask = "22222222222222222222222222222222"
)

// frozen is a copy of a state directory as another agent wrote it. They are
// never written again: testdata/foundation is the first format there was, and
// testdata/future has what this agent does not know.
func frozen(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))); err != nil {
		t.Fatal(err)
	}
	return dir
}

func reopen(t *testing.T, dir string) (*Journal, agent.Saved) {
	t.Helper()
	j, saved, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j, saved
}

func TestStateOfTheFirstFormatIsRead(t *testing.T) {
	dir := frozen(t, "foundation")
	_, saved := reopen(t, dir)
	three := 3
	if len(saved.Tasks) != 2 || saved.Tasks[0].Assignment.GetTaskId() != webTask || saved.Tasks[1].Assignment.GetTaskId() != jobTask {
		t.Fatalf("tasks: %+v", saved.Tasks)
	}
	for i := range saved.Tasks {
		saved.Tasks[i].Assignment = nil
	}
	want := agent.Saved{
		Applied: agent.Applied{Incarnation: "0a", Sequence: 5},
		Tasks: []agent.SavedTask{{
			Origin: "0a", Status: &agent.StatusRecord{LastStatus: "RUNNING"},
			Attempts: []agent.AttemptRecord{{
				Container: "main", Number: 2, BootID: "b0", Image: "registry.example/web:1", Digest: "sha256:ab", HostPorts: []int{40001},
				Devices: []agent.DeviceRef{{Plugin: "nvidia", ID: "GPU-1"}}, StartedAt: 90 * time.Second, Started: true, RuntimeID: "r2",
			}},
		}, {
			Origin: "0a", Desired: &agent.Desired{Status: "STOPPED", Reason: "enough", Sequence: 6},
			Status: &agent.StatusRecord{LastStatus: "STOPPED", StopCode: "EssentialContainerExited", Reason: "Essential container in task exited", Acked: true},
			Attempts: []agent.AttemptRecord{{
				Container: "main", Number: 1, BootID: "b0", StartedAt: 95 * time.Second, Started: true, RuntimeID: "r3",
				Exited: true, ExitCode: &three, RanFor: 7 * time.Second,
			}},
		}},
	}
	if diff := cmp.Diff(want, saved); diff != "" {
		t.Error(diff)
	}
}

func TestStateOfTheNextFormatIsReadAndLosesNothing(t *testing.T) {
	dir := frozen(t, "future")
	file := filepath.Join(dir, "tasks", webTask, "assignment")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	j, saved := reopen(t, dir)
	if len(saved.Problems) > 0 || saved.Unwritable != "" || len(saved.Tasks) != 2 || saved.Applied.Sequence != 5 {
		t.Fatalf("%+v", saved)
	}
	if a := saved.Tasks[0].Attempts; len(a) != 1 || a[0].Number != 3 {
		t.Errorf("attempts %+v", a)
	}
	if err := j.Append(agent.Record{Task: webTask, Desired: &agent.Desired{Status: "STOPPED"}}); err != nil {
		t.Fatal(err)
	}
	log := func() string {
		t.Helper()
		if err := j.compact(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var counts []int
	count := func(text string) {
		var n []int
		for _, s := range []string{`"cell":{"name":"north"}`, `"secret":"s1"`, `"secret":"s2"`, `"sandbox":"gvisor"`, `"enough"`} {
			n = append(n, strings.Count(text, s))
		}
		counts = n
	}
	for range 3 {
		if count(log()); !cmp.Equal(counts, []int{1, 1, 1, 1, 1}) {
			t.Fatalf("after a rewrite: %v", counts)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		j, saved = reopen(t, dir)
		if d := saved.Tasks[0].Desired; d == nil || d.Status != "STOPPED" || len(saved.Problems) > 0 {
			t.Fatalf("what this agent wrote: %+v", saved)
		}
	}
	if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, before) {
		t.Errorf("the assignment was touched: %v", err)
	}
	// Newer words of our own replace it, and what is forgotten takes all along.
	if err := j.Append(agent.Record{Task: webTask, Attempt: &agent.AttemptRecord{Container: "main", Number: 4}}); err != nil {
		t.Fatal(err)
	}
	if err := j.ForgetTask(jobTask); err != nil {
		t.Fatal(err)
	}
	if count(log()); !cmp.Equal(counts, []int{1, 1, 0, 0, 0}) {
		t.Errorf("in the end: %v", counts)
	}
}

// Every byte of every file damaged in several ways, and every length: the
// journal opens, no task is silently absent, and what differs is reported.
func TestEveryDamageOfOneFileIsSurvived(t *testing.T) {
	files := map[string][]byte{}
	for _, name := range []string{"log", "tasks/" + webTask + "/assignment", "tasks/" + jobTask + "/assignment"} {
		b, err := os.ReadFile(filepath.Join("testdata/future", name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = b
	}
	load := func(t *testing.T, name string, content []byte) agent.Saved {
		t.Helper()
		disk := newSimDisk()
		for n, b := range files {
			if n == name {
				b = content
			}
			if err := disk.mkdir(filepath.Dir(n)); err != nil && filepath.Dir(n) != "." {
				t.Fatal(err)
			}
			dir, err := disk.dir(filepath.Dir(n))
			if err != nil {
				t.Fatal(err)
			}
			dir.change(map[string]any{filepath.Base(n): newFile(b)})
		}
		_, saved, err := open(disk)
		if err != nil {
			t.Fatalf("%s: open: %v", name, err)
		}
		if again, next, err := open(disk); err != nil || len(next.Tasks) != len(saved.Tasks) || len(saved.Problems) > 0 && again.Append() != nil {
			t.Fatalf("%s: open again: %v, %d tasks, then %d", name, err, len(saved.Tasks), len(next.Tasks))
		}
		return saved
	}
	clean := load(t, "", nil)
	same := func(s agent.Saved) bool { return cmp.Equal(clean, s, protocmp.Transform()) }
	for name, b := range files {
		for at := range b {
			bad, x := bytes.Clone(b), byte(1<<(at%8))
			if at%2 == 0 && b[at] != 0 {
				x = b[at]
			}
			bad[at] ^= x
			s := load(t, name, bad)
			if len(s.Tasks) != 2 {
				t.Fatalf("%s: byte %d: %d tasks", name, at, len(s.Tasks))
			}
			if len(s.Problems) == 0 && !same(s) {
				t.Errorf("%s: byte %d with %#x: something else is read and nothing said", name, at, x)
			}
		}
		for size := range b {
			s := load(t, name, b[:size])
			if len(s.Tasks) != 2 {
				t.Fatalf("%s cut to %d bytes: %d tasks", name, size, len(s.Tasks))
			}
			if name != "log" && len(s.Problems) == 0 {
				t.Errorf("%s cut to %d bytes: nothing said", name, size)
			}
		}
	}
}
