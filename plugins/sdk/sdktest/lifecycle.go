package sdktest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// forever keeps a shell busy until it is told to end; it says when its trap is
// in place.
const (
	onTerm     = `trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done`
	ignoreTerm = `trap '' TERM; echo ready; while :; do sleep 0.1; done`
	stay       = `echo started; while :; do sleep 1; done`
)

func testInfo(t T, r *rig) {
	if r.info.Version == "" {
		t.Error("Info has no version")
	}
	if len(r.info.Networks) == 0 {
		t.Error("Info names no network")
	}
	for _, n := range r.info.Networks {
		if !slices.Contains([]string{sdk.NetworkBridge, sdk.NetworkHost, sdk.NetworkNone}, n) {
			t.Errorf("Info names network %q", n)
		}
	}
	again, err := r.runtime.Info(r.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(r.info, again) {
		t.Errorf("Info changed from %+v to %+v", r.info, again)
	}
}

func testExitCodes(t T, r *rig) {
	for _, code := range []int{0, 1, 3, 255} {
		req, _ := r.start(t, fmt.Sprintf("exit %d", code))
		r.wantExit(t, req.Attempt, code)
	}
}

// testRanFor: how long a container ran need not be known. Known, it is the time
// of the container, not that of the call that asks.
func testRanFor(t T, r *rig) {
	begun := time.Now()
	req, c := r.start(t, "sleep 1; exit 3")
	if c.RanFor != 0 {
		t.Errorf("Start returned one that runs and says it ran for %s", c.RanFor)
	}
	ended := r.exit(t, req.Attempt)
	checkExit(t, "List", ended, 3)
	most := time.Since(begun) + 100*time.Millisecond // clocks are read at different moments
	if ended.RanFor == 0 {
		t.Logf("it does not say how long a container ran")
		return
	}
	if least := 900 * time.Millisecond; ended.RanFor < least || ended.RanFor > most {
		t.Errorf("it ran for %s, want what it did: %s to %s", ended.RanFor, least, most)
	}
	other := sdk.Attempt{Task: req.Attempt.Task, Container: "other", Number: 1}
	if _, err := r.runtime.Start(r.ctx(t), r.request(t, other, r.spec("exit 0"))); err != nil {
		t.Fatalf("Start of another container: %v", err)
	}
	r.exit(t, other) // some time later
	if later := r.exit(t, req.Attempt); later.RanFor != ended.RanFor {
		t.Errorf("it ran for %s, and asked again for %s", ended.RanFor, later.RanFor)
	}
}

func testStartResult(t T, r *rig) {
	req, c := r.start(t, stay)
	if c.Attempt != req.Attempt || c.State != sdk.StateRunning || c.RuntimeID == "" || c.PID <= 1 || c.ExitCode != nil {
		t.Errorf("Start returned %+v: want the attempt, running, with a runtime id, a pid and no exit code", c)
	}
	if r.info.Images && c.ImageDigest != r.image.Digest {
		t.Errorf("Start returned image digest %q, want %q", c.ImageDigest, r.image.Digest)
	}
	if listed, _ := r.find(t, req.Attempt); !reflect.DeepEqual(c, listed) {
		t.Errorf("Start returned %+v, List has %+v", c, listed)
	}
}

func testStartAdoptsRunning(t T, r *rig) {
	req, first := r.start(t, stay)
	r.wantOutput(t, req.Stdout, "started\n")
	second, err := r.runtime.Start(r.ctx(t), req)
	if err != nil {
		t.Fatalf("second Start: %v", err)
	}
	if !reflect.DeepEqual(first, second) {
		t.Errorf("second Start made or found something else: first %+v, then %+v", first, second)
	}
	if got := readFile(t, req.Stdout); got != "started\n" {
		t.Errorf("output is %q: the program ran twice", got)
	}
}

func testStartAdoptsExited(t T, r *rig) {
	req, first := r.start(t, "echo started; exit 5")
	r.wantExit(t, req.Attempt, 5)
	second, err := r.runtime.Start(r.ctx(t), req)
	if err != nil {
		t.Fatalf("second Start: %v", err)
	}
	checkExit(t, "second Start", second, 5)
	if second.RuntimeID != first.RuntimeID {
		t.Errorf("second Start returned runtime id %q, want %q", second.RuntimeID, first.RuntimeID)
	}
	r.wantOutput(t, req.Stdout, "started\n")
}

func testSecondAttempt(t T, r *rig) {
	req, _ := r.start(t, "exit 4")
	r.wantExit(t, req.Attempt, 4)
	next := req.Attempt
	next.Number = 2
	if _, err := r.runtime.Start(r.ctx(t), r.request(t, next, r.spec("exit 6"))); err != nil {
		t.Fatalf("Start of attempt 2: %v", err)
	}
	r.wantExit(t, next, 6)
	r.wantExit(t, req.Attempt, 4)
}

func testStopTerm(t T, r *rig) {
	req, c := r.start(t, onTerm)
	r.wantOutput(t, req.Stdout, "ready\n")
	begun := time.Now()
	stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, r.patience(20*time.Second))
	if err != nil {
		t.Fatalf("Stop: %v", err)
	}
	if took := time.Since(begun); took > r.patience(10*time.Second) {
		t.Errorf("Stop took %s though the program ended at once", took)
	}
	checkExit(t, "Stop", stopped, 7)
	r.wantOutput(t, req.Stdout, "ready\nbye\n")
	r.gone(t, c.PID)
}

func testStopKill(t T, r *rig) {
	req, c := r.start(t, ignoreTerm)
	r.wantOutput(t, req.Stdout, "ready\n")
	const grace = 1500 * time.Millisecond
	begun := time.Now()
	stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, grace)
	if err != nil {
		t.Fatalf("Stop: %v", err)
	}
	if took := time.Since(begun); took < grace {
		t.Errorf("Stop killed after %s, before the grace of %s was over", took, grace)
	} else if took > grace+r.patience(8*time.Second) {
		t.Errorf("Stop took %s with a grace of %s", took, grace)
	}
	checkExit(t, "Stop", stopped, 137)
	r.gone(t, c.PID)
}

func testStopNoGrace(t T, r *rig) {
	req, _ := r.start(t, ignoreTerm)
	r.wantOutput(t, req.Stdout, "ready\n")
	begun := time.Now()
	stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0)
	if err != nil {
		t.Fatalf("Stop: %v", err)
	}
	checkExit(t, "Stop", stopped, 137)
	if took := time.Since(begun); took > r.patience(8*time.Second) {
		t.Errorf("Stop without grace took %s", took)
	}
}

func testStopExited(t T, r *rig) {
	req, _ := r.start(t, "exit 9")
	r.wantExit(t, req.Attempt, 9)
	for range 2 {
		stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, time.Minute)
		if err != nil {
			t.Fatalf("Stop: %v", err)
		}
		checkExit(t, "Stop", stopped, 9)
	}
}

func testStopCanceled(t T, r *rig) {
	req, c := r.start(t, ignoreTerm)
	r.wantOutput(t, req.Stdout, "ready\n")
	ctx, cancel := context.WithTimeout(r.ctx(t), 300*time.Millisecond)
	defer cancel()
	_, err := r.runtime.Stop(ctx, req.Attempt, time.Hour)
	wantKind(t, "Stop past its deadline", err, sdk.Deadline, sdk.Canceled)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("errors.Is(err, context.DeadlineExceeded) is false for %v", err)
	}
	<-time.After(r.patience(500 * time.Millisecond)) // what it may have begun takes its time
	if got, ok := r.find(t, req.Attempt); !ok || got.State != sdk.StateRunning || got.PID != c.PID {
		t.Errorf("after a Stop that was given up List has %+v, want it running as %d", got, c.PID)
	}
	stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0)
	if err != nil {
		t.Fatalf("Stop: %v", err)
	}
	checkExit(t, "Stop", stopped, 137)
}

func testNotFound(t T, r *rig) {
	unknown := sdk.Attempt{Task: newID(), Container: "main", Number: 1}
	_, err := r.runtime.Stop(r.ctx(t), unknown, time.Second)
	wantKind(t, "Stop", err, sdk.NotFound)
	if !errors.Is(err, sdk.NotFound) {
		t.Errorf("errors.Is(err, sdk.NotFound) is false for %v", err)
	}
	if r.info.Stats {
		_, err = r.runtime.Stats(r.ctx(t), unknown)
		wantKind(t, "Stats", err, sdk.NotFound)
	}
	if r.info.Exec {
		_, err = r.runtime.Exec(r.ctx(t), sdk.ExecRequest{Attempt: unknown, Command: []string{"true"}, Timeout: time.Second})
		wantKind(t, "Exec", err, sdk.NotFound)
	}
	if err := r.runtime.Remove(r.ctx(t), unknown); err != nil {
		t.Errorf("Remove of what is not there: %v", err)
	}
	if err := r.runtime.RemoveTask(r.ctx(t), unknown.Task); err != nil {
		t.Errorf("RemoveTask of what is not there: %v", err)
	}
}

func testRemove(t T, r *rig) {
	req, c := r.start(t, stay)
	wantKind(t, "Remove of a running attempt", r.runtime.Remove(r.ctx(t), req.Attempt), sdk.Conflict)
	if got, ok := r.find(t, req.Attempt); !ok || got.PID != c.PID {
		t.Errorf("after a refused Remove List has %+v, want pid %d", got, c.PID)
	}
	if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.runtime.Remove(r.ctx(t), req.Attempt); err != nil {
			t.Errorf("Remove: %v", err)
		}
		if got, ok := r.find(t, req.Attempt); ok {
			t.Errorf("after Remove List has %+v", got)
		}
	}
	_, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0)
	wantKind(t, "Stop after Remove", err, sdk.NotFound)
}

func testList(t T, r *rig) {
	want := map[sdk.Attempt]sdk.State{}
	var tasks []string
	for i := range 2 {
		task := r.task(t)
		tasks = append(tasks, task)
		for _, name := range []string{"main", "side-car_2"} {
			a := sdk.Attempt{Task: task, Container: name, Number: i + 1}
			script, state := stay, sdk.StateRunning
			if name == "main" {
				script, state = "exit 0", sdk.StateExited
			}
			if _, err := r.runtime.Start(r.ctx(t), r.request(t, a, r.spec(script))); err != nil {
				t.Fatalf("Start: %v", err)
			}
			want[a] = state
		}
	}
	r.eventually(t, "List", func() error {
		inv, err := r.runtime.List(r.ctx(t))
		if err != nil {
			return err
		}
		got := map[sdk.Attempt]sdk.State{}
		for _, c := range inv.Containers {
			if _, mine := want[c.Attempt]; mine {
				got[c.Attempt] = c.State
			}
		}
		if !maps.Equal(got, want) {
			return fmt.Errorf("it has %v, want %v", got, want)
		}
		for _, task := range tasks {
			if !slices.Contains(inv.Tasks, task) {
				return fmt.Errorf("tasks %v lack %s", inv.Tasks, task)
			}
		}
		return nil
	})
}

func testTasks(t T, r *rig) {
	has := func(id string) bool {
		inv, err := r.runtime.List(r.ctx(t))
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(inv.Tasks, id)
	}
	spec := sdk.TaskSpec{ID: newID(), Family: "sdktest", Network: r.opts.Network, Containers: []string{"main"}}
	t.Cleanup(func() { r.cleanUp(t, spec.ID) })
	for range 2 {
		if err := r.runtime.PrepareTask(r.ctx(t), spec); err != nil {
			t.Fatalf("PrepareTask: %v", err)
		}
		if !has(spec.ID) {
			t.Error("List lacks a prepared task")
		}
	}
	for range 2 {
		if err := r.runtime.RemoveTask(r.ctx(t), spec.ID); err != nil {
			t.Fatalf("RemoveTask: %v", err)
		}
		if has(spec.ID) {
			t.Error("List has a removed task")
		}
	}
}

func testMissingProgram(t T, r *rig) {
	spec := r.spec("")
	spec.EntryPoint, spec.Command = []string{"/no/such/program"}, nil
	if !r.info.Images {
		spec.EntryPoint, spec.Command = nil, []string{"/no/such/program"}
	}
	a := sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}
	_, err := r.runtime.Start(r.ctx(t), r.request(t, a, spec))
	wantKind(t, "Start of a program that is not there", err, r.opts.MissingProgram)
	if c, ok := r.find(t, a); ok && c.State == sdk.StateRunning {
		t.Errorf("after an error Start left %+v", c)
	}
}

func testUnsupportedNetwork(t T, r *rig) {
	for _, network := range []string{sdk.NetworkBridge, sdk.NetworkHost, sdk.NetworkNone} {
		if slices.Contains(r.info.Networks, network) {
			continue
		}
		id := newID()
		err := r.runtime.PrepareTask(r.ctx(t), sdk.TaskSpec{ID: id, Network: network, Containers: []string{"main"}})
		if err == nil {
			req := r.request(t, sdk.Attempt{Task: id, Container: "main", Number: 1}, r.spec("exit 0"))
			req.Network = network
			_, err = r.runtime.Start(r.ctx(t), req)
		}
		wantKind(t, "network "+network, err, sdk.Unsupported)
		r.cleanUp(t, id)
	}
}

func testConcurrent(t T, r *rig) {
	const n = 8
	requests := make([]sdk.StartRequest, n)
	for i := range requests {
		requests[i] = r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1},
			r.spec(fmt.Sprintf("echo %d; exit %d", i, 20+i)))
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range requests {
		wg.Go(func() { _, errs[i] = r.runtime.Start(r.ctx(t), requests[i]) })
	}
	wg.Wait()
	for i, req := range requests {
		if errs[i] != nil {
			t.Errorf("Start %d: %v", i, errs[i])
			continue
		}
		r.wantExit(t, req.Attempt, 20+i)
		r.wantOutput(t, req.Stdout, fmt.Sprintf("%d\n", i))
	}
}

func testEvents(t T, r *rig) {
	ctx, cancel := context.WithCancel(r.ctx(t))
	hints, ended := make(chan sdk.Attempt, 64), make(chan error, 1)
	go func() {
		ended <- r.runtime.Events(ctx, func(a sdk.Attempt) {
			select {
			case hints <- a:
			default:
			}
		})
	}()
	// A hint may be lost while the stream is being set up, so exits are made
	// until one is heard of.
	heard := false
	for try := 0; try < 5 && !heard; try++ {
		req, _ := r.start(t, "exit 0")
		r.wantExit(t, req.Attempt, 0)
		patience := time.After(r.patience(3 * time.Second))
		for waiting := true; waiting && !heard; {
			select {
			case a := <-hints:
				heard = a == req.Attempt
			case <-patience:
				waiting = false
			}
		}
	}
	if !heard {
		t.Error("no event hinted at an exit")
	}
	cancel()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("Events returned nil though its context ended")
		}
	case <-time.After(r.patience(5 * time.Second)):
		t.Error("Events did not return when its context ended")
	}
}

func testNothingLeft(t T, r *rig) {
	inv, err := r.runtime.List(r.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.Containers) > 0 || len(inv.Tasks) > 0 {
		t.Errorf("after everything was removed List has %+v", inv)
	}
}
