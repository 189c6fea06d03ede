package clock

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// loop is a device with a container that crashes all the time. A restart policy
// of the API does not start again what ran for less than a minute, and what ran
// for longer has no back-off; so this device's control plane is a scripted one
// with a shorter minute.
type loop struct {
	*device
	dir string
}

const (
	loopRun  = 2 * time.Second
	least    = 100 * time.Millisecond // of the back-off
	tick     = 10 * time.Millisecond  // of /proc/uptime
	loopTask = "0123456789abcdef0123456789abcdef"
)

// late is what a start may take beside the wait.
func late() time.Duration { return slow(4 * time.Second) }

func newLoop(t *testing.T, s *site) *loop {
	t.Helper()
	cp := wiretest.NewControlPlane(t)
	l := &loop{dir: s.dir}
	answer := func(f *wire.Frame) []*wire.Frame { return l.answer(cp.Address(), f) }
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { serve(ctx, cp.Listener, answer, &serving) })
	t.Cleanup(func() {
		cancel()
		_ = cp.Close()
		serving.Wait()
	})
	code, err := wire.ActivationCode{
		Addresses: []string{cp.Address()}, Pin: cp.CA.Pin(), ID: strings.Repeat("ab", 16), Secret: bytes.Repeat([]byte{7}, 32),
	}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	l.device = s.with(t, "loop", code)
	l.start(t)
	return l
}

// serve answers frames until the listener is closed.
func serve(ctx context.Context, ln *carrier.Listener, answer func(*wire.Frame) []*wire.Frame, serving *sync.WaitGroup) {
	for {
		session, err := ln.Accept(ctx)
		if err != nil {
			return
		}
		serving.Go(func() {
			defer session.Close("", "")
			stream, err := session.AcceptStream(ctx)
			if err != nil {
				return
			}
			for {
				f, err := wire.ReadFrame(stream)
				if err != nil {
					return
				}
				for _, a := range answer(f) {
					if err := wire.WriteFrame(stream, a); err != nil {
						return
					}
				}
			}
		})
	}
}

// answer is what a control plane says that wishes for one task.
func (l *loop) answer(address string, f *wire.Frame) []*wire.Frame {
	switch {
	case f.GetEnrollRequest() != nil:
		return []*wire.Frame{{Body: &wire.Frame_EnrollResponse{EnrollResponse: &wire.EnrollResponse{
			InstanceId: strings.Repeat("1f", 16), Cluster: cluster, Addresses: []string{address}}}}}
	case f.GetHello() != nil:
		script := note(l.dir, "loop.starts") + fmt.Sprintf("sleep %d; ", loopRun/time.Second) + note(l.dir, "loop.ends") + "exit 9"
		return []*wire.Frame{
			{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{Version: 1, Incarnation: "i1", ControlVersion: "t", Full: true, Addresses: []string{address}}}},
			{Body: &wire.Frame_Assignment{Assignment: &wire.Assignment{Sequence: 1, TaskId: loopTask, Desired: "RUNNING", Spec: &wire.TaskSpec{
				Family: "loop", Revision: 1, Cluster: cluster, Group: "family:loop", Runtime: "process", Network: "host",
				Containers: []*wire.Container{{
					Name: "c", Essential: true, Command: []string{"/bin/sh", "-c", script}, CommandSet: true,
					RestartPolicy: &wire.RestartPolicy{Enabled: true, AttemptPeriodS: 1},
				}},
			}}}},
			{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: 1, Full: true}}},
		}
	case f.GetTaskStatus() != nil:
		return []*wire.Frame{{Body: &wire.Frame_StatusAck{StatusAck: &wire.StatusAck{Sequence: f.GetTaskStatus().Sequence}}}}
	}
	return nil
}

// check holds each wait between a crash and the next start against the
// back-off: full jitter below a ceiling that doubles from 1 s to a minute.
func (l *loop) check(t *testing.T) {
	t.Helper()
	starts, ends := noted(t, l.dir, "loop.starts"), noted(t, l.dir, "loop.ends")
	if len(starts) < 6 || len(ends) < len(starts)-1 {
		t.Fatalf("it was started at %v and crashed at %v", starts, ends)
	}
	for n, end := range ends {
		if run := end - starts[n]; run < loopRun-2*tick {
			t.Errorf("run %d took %s", n+1, run)
		}
		ceiling := min(time.Minute, time.Second<<min(n, 6))
		if n+1 == len(starts) {
			if waits := uptime() - end; waits > ceiling+late() {
				t.Errorf("it has not been started for %s since crash %d, whose back-off is at most %s", waits, n+1, ceiling)
			}
			continue
		}
		wait := starts[n+1] - end
		t.Logf("loop: %.1f s after boot, start %d came %s after the crash, back-off at most %s", starts[n+1].Seconds(), n+2, wait, ceiling)
		if wait < least-tick || wait > ceiling+late() {
			t.Errorf("start %d came %s after the crash, the back-off is between %s and %s", n+2, wait, least, ceiling)
		}
	}
}
