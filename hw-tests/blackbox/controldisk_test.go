package blackbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// TestControlOnFullDisk: with its disk filled to the last byte a control plane
// takes no change and says why, reads and tunnels go on, and what was asked
// meanwhile is done once when there is room, without a restart.
func TestControlOnFullDisk(t *testing.T) {
	logs := tempDir(t)
	disk := filepath.Join(logs, "control")
	smallDisk(t, disk, "256m")
	control, err := rig.StartControl(deadline(t, patience), bin(t), logs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		control.Kill()
		if t.Failed() {
			t.Logf("control plane's last words:\n%s", control.Tail(6000))
		}
	})
	s := &site{Control: control, cli: control.CLI(), runtime: "process", dir: tempDir(t)}
	s.agent = newDevice(t, s.cli, s.dir, func(*rig.Agent) {})
	if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
		t.Fatal(err)
	}
	gate := filepath.Join(s.dir, "gate")
	stays := s.run(t, "stays", container{"name": "c", "script": "while :; do sleep 0.1; done"})
	ends := s.run(t, "ends", container{"name": "c", "script": "until [ -e " + gate + " ]; do sleep 0.1; done; exit 7"})
	again := []string{"task", "run", "--cluster", cluster, "--taskdef", "stays", "--client-token", "asked-before"}
	tasks := func(want int) {
		t.Helper()
		var l struct{ Tasks []rig.Task }
		if err := s.cli.JSON(deadline(t, patience), &l, "task", "list", "--cluster", cluster, "--all"); err != nil || len(l.Tasks) != want {
			t.Errorf("%d tasks, %v; want %d", len(l.Tasks), err, want)
		}
	}

	balloon := filepath.Join(disk, "balloon")
	fill(t, balloon)
	pid := control.PID()
	why := []string{"nearly full", "make room", disk}
	refused(t, s.cli, "", 1, why, "cluster", "create", "half-done")
	refused(t, s.cli, s.document(t, "late", container{"name": "c", "script": "exit 0"}), 1, why, "taskdef", "register", "-f", "-")
	refused(t, s.cli, "", 1, why, "activation", "create", "--cluster", cluster)
	refused(t, s.cli, "", 0, why, again...)
	tasks(2)
	if out, err := s.cli.Run(deadline(t, patience), "cluster", "list"); err != nil || strings.Contains(string(out), "half-done") {
		t.Errorf("half done: %v\n%s", err, out)
	}
	if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
		t.Error(err)
	}
	// An end that cannot be written down is neither lost nor acknowledged.
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := rig.Until(deadline(t, patience), control.Process, "the refused status in the log", func() error {
		if !strings.Contains(control.Tail(1<<20), "store a task's status") {
			return errors.New("not there")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if now, err := s.cli.Describe(deadline(t, patience), ends.ID); err != nil || stopped(now) {
		t.Errorf("shown, and would be gone after a crash: %+v, %v", now, err)
	}
	if control.PID() != pid {
		t.Error("the control plane was restarted")
	}
	if err := os.Remove(balloon); err != nil {
		t.Fatal(err)
	}

	// By itself.
	if now := s.await(t, ends.ID, "the end that was held back", patience, stopped); now.Container("c").ExitCode == nil || *now.Container("c").ExitCode != 7 {
		t.Errorf("the end that was held back: %+v", now)
	}
	var first, second struct{ Tasks []rig.Task }
	for _, v := range []any{&first, &second} {
		if err := s.cli.JSON(deadline(t, patience), v, again...); err != nil {
			t.Fatal(err)
		}
	}
	if len(first.Tasks) != 1 || len(second.Tasks) != 1 || first.Tasks[0].ID != second.Tasks[0].ID {
		t.Errorf("the retry made another task: %+v, %+v", first, second)
	}
	tasks(3)

	// Killed right after changes, and started with the disk full: it serves
	// reads, or it cannot write its database and says so, now or soon. Nothing is
	// lost.
	var made []string
	for i := range 5 {
		name := fmt.Sprintf("made-%d", i)
		if _, err := s.cli.Run(deadline(t, patience), "cluster", "create", name); err != nil {
			t.Fatal(err)
		}
		made = append(made, name)
	}
	control.Kill()
	fill(t, balloon)
	const clearWord = "make room there and start belay-control again"
	switch err := control.Restart(deadline(t, patience)); {
	case err == nil:
		t.Log("started on the full disk")
		// etcd writes of its own accord now and then, and may end it any time.
		_, err := control.CLI().Run(deadline(t, patience), "cluster", "create", "half-done")
		var e *rig.ExitError
		switch {
		case !errors.As(err, &e):
			t.Errorf("a change on a full disk: %v", err)
		case strings.Contains(e.Stderr, "nearly full"):
		default:
			select {
			case <-control.Done():
			case <-time.After(patience):
			}
			if last := control.Tail(6000); !strings.Contains(last, clearWord) {
				t.Errorf("neither refused nor ended with a clear word: %v\n%s", e, last)
			}
		}
	case strings.Contains(err.Error(), clearWord):
		t.Log("ended at its start, with a clear word")
	default:
		t.Error(err)
	}
	control.Kill()
	if err := os.Remove(balloon); err != nil {
		t.Fatal(err)
	}
	if err := control.Restart(deadline(t, patience)); err != nil {
		t.Fatal(err)
	}
	out, err := s.cli.Run(deadline(t, patience), "cluster", "list")
	for _, name := range made {
		if err != nil || !strings.Contains(string(out), name) {
			t.Errorf("%s was acknowledged and is lost: %v\n%s", name, err, out)
		}
	}
	tasks(3)
	if _, err := s.cli.Connected(deadline(t, patience), cluster, 1, "process"); err != nil {
		t.Fatal(err)
	}
	if now := s.await(t, stays.ID, "what ran all the time", 10*time.Second, running); now.Container("c").PID != stays.Container("c").PID {
		t.Errorf("what ran all the time was started again: %+v", now)
	}
	s.sweep(t)
}
