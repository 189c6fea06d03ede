package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

func TestBackoff(t *testing.T) {
	silence := errors.New("no answer")
	refusal := func(code string, after time.Duration) error {
		return &wire.Error{Code: code, RetryAfter: after}
	}
	tests := []struct {
		name  string
		since time.Duration // the link was lost
		tries int           // before
		err   error
		least time.Duration
		most  time.Duration
	}{
		{"first try", 0, 0, silence, 0, 100 * time.Millisecond},
		{"silence, soon", time.Minute, 50, silence, 0, time.Second},
		{"silence, long", 3 * time.Minute, 50, silence, 0, 15 * time.Second},
		{"deregistered", 0, 0, refusal(wire.CodeDenied, 0), 30 * time.Second, time.Minute},
		{"unknown instance", time.Hour, 99, refusal(wire.CodeNotFound, 0), 30 * time.Second, time.Minute},
		{"busy with a hint", 0, 0, refusal(wire.CodeOverloaded, 20*time.Second), 20 * time.Second, 20*time.Second + 100*time.Millisecond},
		{"a hint of an hour", 0, 0, refusal(wire.CodeOverloaded, time.Hour), time.Minute, time.Minute},
		{"busy for long", 0, 50, refusal(wire.CodeOverloaded, 0), 0, time.Minute},
		{"shutdown", 0, 0, refusal(wire.CodeShutdown, 500*time.Millisecond), 500 * time.Millisecond, 600 * time.Millisecond},
		{"another key", 0, 50, carrier.ErrWrongPin, 0, 15 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for edge, uniform := range map[time.Duration]float64{tt.least: 0, tt.most: 1} {
				now := time.Now()
				b := newBackoff(now.Add(-tt.since), func() float64 { return uniform })
				b.tries = tt.tries
				if got := b.next(now, tt.err); got != edge {
					t.Errorf("at %.0f: %s, want %s", uniform, got, edge)
				}
			}
		})
	}
}

// dialer hands out pipes and writes down when it was asked.
type dialer struct {
	began time.Time
	next  func(n int) (wire.Session, error)

	mu    sync.Mutex
	times []time.Duration
}

func (d *dialer) dial(_ context.Context, _, _ string) (wire.Session, error) {
	d.mu.Lock()
	d.times = append(d.times, time.Since(d.began))
	n := len(d.times)
	d.mu.Unlock()
	return d.next(n)
}

func (d *dialer) asked() []time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.times)
}

func bubble(t *testing.T, next func(n int) (wire.Session, error), f func(l *Link, d *dialer, down *downlink)) {
	synctest.Test(t, func(t *testing.T) {
		d := &dialer{began: time.Now(), next: next}
		down := &downlink{}
		l, err := New(Config{
			InstanceID: instanceA, Addresses: []string{"control.example:7443"}, Transport: wire.TransportQUIC, Clock: clock{},
			dial: d.dial, rand: func() float64 { return 0.999 },
		})
		if err != nil {
			t.Fatal(err)
		}
		l.Attach(down)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		f(l, d, down)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSilenceIsRetriedEverySecondAtFirst(t *testing.T) {
	bubble(t, func(int) (wire.Session, error) { return nil, carrier.ErrUnreachable }, func(_ *Link, d *dialer, _ *downlink) {
		<-time.After(2 * time.Minute)
		synctest.Wait()
		early := len(d.asked())
		if early < 115 || early > 130 {
			t.Errorf("%d tries in two minutes, want about one a second", early)
		}
		<-time.After(10 * time.Minute)
		synctest.Wait()
		if late := len(d.asked()) - early; late < 38 || late > 60 {
			t.Errorf("%d tries in the ten minutes after, want about four a minute", late)
		}
	})
}

func TestOfflineDeviceLoggedEveryTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		n := 0
		l, err := New(Config{
			InstanceID: instanceA, Addresses: []string{"control.example:7443"}, Transport: wire.TransportQUIC, Clock: clock{},
			Logger: slog.New(slog.NewTextHandler(&log, nil)),
			dial: func(context.Context, string, string) (wire.Session, error) {
				n++
				return nil, fmt.Errorf("%w: way %d", carrier.ErrUnreachable, n%3)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		l.Attach(&downlink{})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Hour+time.Minute)
		defer cancel()
		if err := l.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if lines := bytes.Count(log.Bytes(), []byte("\n")); lines < 10 || lines > 40 {
			t.Errorf("%d lines in ten hours offline, want each of three errors about once an hour:\n%.500s", lines, &log)
		}
	})
}

// serve answers a hello on a pipe and runs the script.
func serve(p *pipe, w *wire.Welcome, script func()) {
	go func() {
		for range 2 {
			if _, err := wire.ReadFrame(p.control); err != nil {
				return
			}
		}
		_ = wire.WriteFrame(p.control, &wire.Frame{Body: &wire.Frame_Welcome{Welcome: w}})
		if script != nil {
			script()
		}
	}()
}

func TestDeregisteredDeviceAsksSlowlyForEver(t *testing.T) {
	next := func(int) (wire.Session, error) {
		p := newPipe()
		serve(p, &wire.Welcome{Failure: wire.Failf(wire.CodeDenied, "deregistered")}, nil)
		return p, nil
	}
	bubble(t, next, func(l *Link, d *dialer, down *downlink) {
		<-time.After(time.Hour)
		synctest.Wait()
		if n := len(d.asked()); n < 55 || n > 65 {
			t.Errorf("%d tries in an hour, want one a minute", n)
		}
		if s := l.Status(); s.State != StateWaiting || s.LastError == "" {
			t.Errorf("status %+v", s)
		}
		if down.read(func(d *downlink) bool { return len(d.ups) != 0 }) {
			t.Error("the agent was told of a session that never was")
		}
	})
}

func TestBackoffStartsAgainOnlyAfterRegistration(t *testing.T) {
	next := func(n int) (wire.Session, error) {
		if n != 20 {
			return nil, carrier.ErrUnreachable
		}
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() {
			<-time.After(time.Minute)
			p.Close("", "")
		})
		return p, nil
	}
	bubble(t, next, func(_ *Link, d *dialer, _ *downlink) {
		<-time.After(2 * time.Minute)
		synctest.Wait()
		times := d.asked()
		before, after := times[19]-times[18], times[20]-times[19]-time.Minute
		if before < 900*time.Millisecond || after > 110*time.Millisecond {
			t.Errorf("waited %s before the session, %s after", before, after)
		}
	})
}

// A disk that is full makes every session end at its first assignments.
func TestSessionsThatEndAtOnceAreNotRepeatedAtOnce(t *testing.T) {
	next := func(int) (wire.Session, error) {
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() { p.Close("", "") })
		return p, nil
	}
	bubble(t, next, func(_ *Link, d *dialer, _ *downlink) {
		<-time.After(10 * time.Minute)
		synctest.Wait()
		if n := len(d.asked()); n < 550 || n > 650 {
			t.Errorf("%d sessions in ten minutes, want about one a second", n)
		}
	})
}

func TestFullDiskMadeANewSessionForEachTry(t *testing.T) {
	next := func(int) (wire.Session, error) {
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i1"}, func() {
			say := func(f *wire.Frame) { _ = wire.WriteFrame(p.control, f) }
			assign := func(task string) {
				say(&wire.Frame{Body: &wire.Frame_Assignment{Assignment: &wire.Assignment{TaskId: task, Desired: "RUNNING"}}})
			}
			<-time.After(time.Second) // until the disk is full
			assign("a")
			say(&wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: 1, Full: true}}})
			<-time.After(90 * time.Second)
			assign("b")
			say(&wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: 2}}})
			for {
				f, err := wire.ReadFrame(p.control)
				if err != nil {
					return
				}
				if f.GetPing() != nil {
					say(&wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: f.GetPing().GetId()}}})
				}
			}
		})
		return p, nil
	}
	bubble(t, next, func(_ *Link, d *dialer, down *downlink) {
		down.mu.Lock()
		down.full = 8 // 1+2+4+...+60 s: past the second set
		down.mu.Unlock()
		<-time.After(10 * time.Minute)
		synctest.Wait()
		if n := len(d.asked()); n != 1 {
			t.Errorf("%d sessions while the disk was full, want the one", n)
		}
		down.mu.Lock()
		defer down.mu.Unlock()
		if n := len(down.sets); n != 9 {
			t.Errorf("%d tries to persist, want 9", n)
		}
		want := assigned{"i1", true, []string{"a RUNNING", "b RUNNING"}, 2}
		if diff := cmp.Diff(want, down.sets[len(down.sets)-1]); diff != "" {
			t.Errorf("what was persisted in the end (-want +got):\n%s", diff)
		}
	})
}

func TestSilentSessionIsPingedAndGivenUp(t *testing.T) {
	var frames []string
	next := func(n int) (wire.Session, error) {
		if n > 1 {
			return nil, carrier.ErrUnreachable
		}
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() {
			for {
				f, err := wire.ReadFrame(p.control)
				if err != nil {
					return
				}
				frames = append(frames, f.Kind())
			}
		})
		return p, nil
	}
	bubble(t, next, func(l *Link, _ *dialer, down *downlink) {
		synctest.Wait()
		<-time.After(time.Hour)
		if l.Status().State != StateConnected {
			t.Fatal("a session with nothing to say was given up")
		}
		began := time.Now()
		l.TaskStatus(&wire.TaskStatus{Sequence: 1, TaskId: taskB})
		for l.Status().State == StateConnected {
			<-time.After(100 * time.Millisecond)
		}
		synctest.Wait()
		if took := time.Since(began); took < unanswered+lost || took > unanswered+lost+time.Second {
			t.Errorf("given up after %s", took)
		}
		if len(frames) != 2 || frames[1] != "ping" {
			t.Errorf("sent %v, want a status and a ping", frames)
		}
		if down.read(func(d *downlink) bool { return len(d.ups) != 2 }) {
			t.Error("the agent was not told of the session's begin and end")
		}
	})
}

func TestPongKeepsASession(t *testing.T) {
	next := func(int) (wire.Session, error) {
		p := newPipe()
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() {
			for {
				f, err := wire.ReadFrame(p.control)
				if err != nil {
					return
				}
				if ping := f.GetPing(); ping != nil {
					_ = wire.WriteFrame(p.control, &wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: ping.Id}}})
				}
			}
		})
		return p, nil
	}
	bubble(t, next, func(l *Link, d *dialer, _ *downlink) {
		for i := range uint64(20) {
			l.TaskStatus(&wire.TaskStatus{Sequence: i + 1, TaskId: taskB})
			<-time.After(7 * time.Second)
		}
		if n := len(d.asked()); n != 1 || l.Status().State != StateConnected {
			t.Errorf("%d dials", n)
		}
	})
}

// doubting is a pipe whose carrier has doubts when the test says so.
type doubting struct {
	*pipe
	doubt chan struct{}
}

func (d doubting) Doubt() <-chan struct{} { return d.doubt }

func TestDoubtIsAnsweredByAPingAtOnce(t *testing.T) {
	var doubt chan struct{} // of the bubble
	var mu sync.Mutex
	var pinged []time.Duration
	var began time.Time
	deaf := false
	next := func(n int) (wire.Session, error) {
		if n > 1 {
			return nil, carrier.ErrUnreachable
		}
		p := newPipe()
		doubt = make(chan struct{}, 1)
		serve(p, &wire.Welcome{Version: 1, Incarnation: "i"}, func() {
			for {
				f, err := wire.ReadFrame(p.control)
				if err != nil {
					return
				}
				mu.Lock()
				answer := f.GetPing() != nil && !deaf
				if f.GetPing() != nil {
					pinged = append(pinged, time.Since(began))
				}
				mu.Unlock()
				if answer {
					_ = wire.WriteFrame(p.control, &wire.Frame{Body: &wire.Frame_Pong{Pong: &wire.Pong{Id: f.GetPing().Id}}})
				}
			}
		})
		return doubting{p, doubt}, nil
	}
	bubble(t, next, func(l *Link, _ *dialer, _ *downlink) {
		synctest.Wait()
		mu.Lock()
		began = time.Now()
		mu.Unlock()
		raise := func(after time.Duration) {
			<-time.After(after)
			doubt <- struct{}{}
			synctest.Wait()
		}
		raise(time.Minute)
		// The ping before it was answered a moment ago, its timer still runs.
		raise(time.Second)
		raise(time.Second)
		mu.Lock()
		deaf = true
		mu.Unlock()
		// Unanswered ones do not put the end off.
		raise(time.Second)
		raise(3 * time.Second)
		raise(3 * time.Second)
		for l.Status().State == StateConnected {
			<-time.After(100 * time.Millisecond)
		}
		want := []time.Duration{60, 61, 62, 63, 66, 69}
		mu.Lock()
		defer mu.Unlock()
		for i := range want {
			want[i] *= time.Second
		}
		if !slices.Equal(pinged, want) {
			t.Errorf("pinged at %v, want %v", pinged, want)
		}
		if took := time.Since(began); took < 63*time.Second+lost || took > 64*time.Second+lost {
			t.Errorf("given up after %s", took)
		}
	})
}
