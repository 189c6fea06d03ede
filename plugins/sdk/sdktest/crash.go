package sdktest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

func testCrashWhileRunning(t T, r *rig) {
	req, c := r.start(t, `trap 'exit 7' TERM; echo ready; i=0; while :; do i=$((i+1)); sleep 0.1; [ $i = 10 ] && echo later; done`)
	r.wantOutput(t, req.Stdout, "ready\n")
	r.crash()
	r.wantOutput(t, req.Stdout, "ready\nlater\n") // it goes on, and so does its output
	r.launch(t)

	got, ok := r.find(t, req.Attempt)
	if !ok || got.State != sdk.StateRunning || got.PID != c.PID || got.RuntimeID != c.RuntimeID {
		t.Fatalf("after the crash List has %+v, want %+v", got, c)
	}
	adopted, err := r.runtime.Start(r.ctx(t), req)
	if err != nil || adopted.PID != c.PID {
		t.Fatalf("after the crash Start returned %+v, %v, want pid %d", adopted, err, c.PID)
	}
	stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, r.patience(20*time.Second))
	if err != nil {
		t.Fatalf("Stop: %v", err)
	}
	checkExit(t, "Stop", stopped, 7)
	r.crash()
	r.launch(t)
	r.wantExit(t, req.Attempt, 7)
}

func testCrashWhileExiting(t T, r *rig) {
	for _, code := range []int{0, 11} {
		req, c := r.start(t, "echo started; sleep 1; exit "+map[int]string{0: "0", 11: "11"}[code])
		r.crash()
		r.gone(t, c.PID)
		r.launch(t)
		r.wantExit(t, req.Attempt, code)
		adopted, err := r.runtime.Start(r.ctx(t), req)
		if err != nil {
			t.Fatalf("Start after the crash: %v", err)
		}
		checkExit(t, "Start after the crash", adopted, code)
		r.wantOutput(t, req.Stdout, "started\n")
	}
}

func testCrashWhileKilled(t T, r *rig) {
	req, c := r.start(t, stay)
	r.crash()
	if err := syscall.Kill(c.PID, syscall.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", c.PID, err)
	}
	r.gone(t, c.PID)
	r.launch(t)
	r.wantExit(t, req.Attempt, 137)
}

// testCrashInStart kills the plugin at moments all over Start and starts
// again, as an agent does: there is one process in the end, and it ran once.
func testCrashInStart(t T, r *rig) {
	m := r.moments(t, r.opts.HangUp)
	for range r.opts.HangUp {
		req, after := r.crashInStart(t, m)
		c, err := r.runtime.Start(r.ctx(t), req)
		if err != nil {
			t.Errorf("killed after %s: second Start: %v", after, err)
			continue
		}
		if c.State != sdk.StateRunning {
			t.Errorf("killed after %s: second Start returned %+v, want it running", after, c)
			continue
		}
		r.wantOutput(t, req.Stdout, "started\n")
		if got, _ := r.find(t, req.Attempt); got.PID != c.PID {
			t.Errorf("killed after %s: List has pid %d, Start returned %d", after, got.PID, c.PID)
		}
		stopped, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0)
		if err != nil {
			t.Errorf("killed after %s: Stop: %v", after, err)
			continue
		}
		checkExit(t, "Stop", stopped, 137)
		if got := readFile(t, req.Stdout); got != "started\n" {
			t.Errorf("killed after %s: output is %q: the program ran twice", after, got)
		}
	}
}

// testStarterGoesAway ends the caller's context at moments all over Start and
// starts again, as an agent that was killed does while the plugin lives on:
// what ran goes on, and it ran once.
func testStarterGoesAway(t T, r *rig) {
	m := r.moments(t, r.opts.HangUp)
	for range r.opts.HangUp {
		req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, r.spec(stay))
		after := m.next()
		ctx, cancel := context.WithTimeout(r.ctx(t), after)
		begun := time.Now()
		if _, err := r.runtime.Start(ctx, req); err == nil {
			m.took(time.Since(begun))
		}
		cancel()
		var c sdk.Container
		r.eventually(t, fmt.Sprintf("gone away after %s: it runs", after), func() (err error) {
			c, err = r.runtime.Start(r.ctx(t), req)
			return err
		})
		if c.State != sdk.StateRunning {
			t.Errorf("gone away after %s: second Start returned %+v, want it running", after, c)
			continue
		}
		r.wantOutput(t, req.Stdout, "started\n")
		if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil {
			t.Errorf("gone away after %s: Stop: %v", after, err)
			continue
		}
		if got := readFile(t, req.Stdout); got != "started\n" {
			t.Errorf("gone away after %s: output is %q: the program ran twice", after, got)
		}
	}
}

// testCrashInStartGivenUp is an agent that is told to drop the task meanwhile:
// there is no second Start to clear up after the first.
func testCrashInStartGivenUp(t T, r *rig) {
	n := (r.opts.HangUp + 1) / 2
	m := r.moments(t, n)
	for range n {
		req, after := r.crashInStart(t, m)
		// Repeated, as an agent does: what the dead process asked for may
		// still be coming up.
		r.eventually(t, fmt.Sprintf("killed after %s: everything is removed", after), func() error {
			if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil && !errors.Is(err, sdk.NotFound) {
				return err
			}
			if err := r.runtime.Remove(r.ctx(t), req.Attempt); err != nil {
				return err
			}
			return r.runtime.RemoveTask(r.ctx(t), req.Attempt.Task)
		})
		if got, ok := r.find(t, req.Attempt); ok {
			t.Errorf("killed after %s: after Remove List has %+v", after, got)
		}
	}
}

// moments are random ones that cover Start from its beginning to a little
// after its end, each in its own part of it. One Start that took long, on a
// machine with other things to do, must not put them all behind its end.
type moments struct {
	usual time.Duration // how long Start takes
	n, at int
}

func (r *rig) moments(t T, n int) *moments {
	t.Helper()
	m := &moments{usual: time.Hour, n: n}
	for range 3 {
		begun := time.Now()
		first, _ := r.start(t, stay)
		m.took(time.Since(begun))
		if _, err := r.runtime.Stop(r.ctx(t), first.Attempt, 0); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// took says how long a Start took that nothing disturbed.
func (m *moments) took(d time.Duration) { m.usual = min(m.usual, d) }

func (m *moments) next() time.Duration {
	part := (m.usual + m.usual/4) / time.Duration(m.n)
	after := part*time.Duration(m.at) + rand.N(part+1)
	m.at = (m.at + 1) % m.n
	return after
}

// crashInStart kills the plugin at some moment of a Start and launches it
// again.
func (r *rig) crashInStart(t T, m *moments) (req sdk.StartRequest, after time.Duration) {
	t.Helper()
	req = r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, r.spec(stay))
	after = m.next()
	started := make(chan error, 1)
	begun := time.Now()
	var took time.Duration
	go func() {
		_, err := r.runtime.Start(r.ctx(t), req)
		took = time.Since(begun)
		started <- err
	}()
	<-time.After(after)
	r.crash()
	if err := <-started; err == nil {
		m.took(took)
	} else if !errors.Is(err, sdk.Unavailable) {
		t.Errorf("killed after %s: Start failed with kind %q, want unavailable: %v", after, sdk.KindOf(err), err)
	}
	r.launch(t)
	return req, after
}

func testCrashInStop(t T, r *rig) {
	req, c := r.start(t, `trap 'echo term; sleep 1; exit 7' TERM; echo ready; while :; do sleep 0.1; done`)
	r.wantOutput(t, req.Stdout, "ready\n")
	stopped := make(chan error, 1)
	go func() {
		_, err := r.runtime.Stop(r.ctx(t), req.Attempt, time.Minute)
		stopped <- err
	}()
	r.wantOutput(t, req.Stdout, "ready\nterm\n")
	r.crash()
	wantKind(t, "Stop whose plugin was killed", <-stopped, sdk.Unavailable)
	r.gone(t, c.PID)
	r.launch(t)
	again, err := r.runtime.Stop(r.ctx(t), req.Attempt, time.Minute)
	if err != nil {
		t.Fatalf("second Stop: %v", err)
	}
	checkExit(t, "second Stop", again, 7)
}
