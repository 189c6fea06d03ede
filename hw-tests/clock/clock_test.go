// Package clock tests real devices and a real control plane whose wall clock
// is set to other years while tasks run. It sets the machine's clock, so it
// runs only in the machine that `make test-vm VM=clock` boots.
package clock

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
)

const (
	cluster = "clock"
	// allowed is "1" where the clock may be set. With "still" all is done as
	// with 1, and no clock is set.
	allowed = "BELAY_TEST_CLOCK"
)

// slow scales what a real CPU is given to one that is emulated.
func slow(d time.Duration) time.Duration {
	n, _ := strconv.Atoi(os.Getenv("BELAY_TEST_SLOW"))
	return d * time.Duration(max(n, 1))
}

func patience() time.Duration { return slow(30 * time.Second) }

// slack is how late may be what takes a while and begins with a command.
func slack() time.Duration { return slow(10 * time.Second) }

func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// moment waits by a clock that nobody sets.
func moment(d time.Duration) { <-time.After(d) }

func read(id int32) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// uptime is the time since boot, which nobody sets.
func uptime() time.Duration { return read(unix.CLOCK_BOOTTIME) }

// wall is the machine's clock, which is set back when the test ends.
type wall struct {
	t      *testing.T
	offset time.Duration // of the true time to the time since boot
	still  bool
}

func newWall(t *testing.T) *wall {
	w := &wall{t: t}
	switch os.Getenv(allowed) {
	case "1":
	case "still":
		w.still = true
	default:
		t.Skipf("sets the machine's clock: run make test-vm VM=clock (%s=1 sets this one's)", allowed)
	}
	w.offset = read(unix.CLOCK_REALTIME) - uptime()
	t.Cleanup(w.right)
	return w
}

func (w *wall) set(at time.Time) {
	w.t.Helper()
	was := time.Now().UTC()
	if !w.still {
		ts := unix.NsecToTimespec(at.UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			w.t.Fatalf("set the clock to %s: %v", at, err)
		}
	}
	w.t.Logf("%.1f s after boot the clock goes from %s to %s", uptime().Seconds(),
		was.Format(time.DateTime), time.Now().UTC().Format(time.DateTime))
}

// right sets the clock to what it would be, had nobody touched it.
func (w *wall) right() { w.set(time.Unix(0, int64(w.offset+uptime()))) }

// never is the clock of a board that has none: a minute ahead of the time since
// boot, which is the least that the kernel takes.
func (w *wall) never() { w.set(time.Unix(60, int64(read(unix.CLOCK_MONOTONIC)))) }

func (w *wall) year(y int) { w.set(time.Date(y, 6, 1, 12, 0, 0, 0, time.UTC)) }

// The stages that the devices go through, after the first.
var stages = []struct {
	name string
	set  func(*wall)
}{
	{"2026", (*wall).right},
	{"2036", func(w *wall) { w.year(2036) }},
	{"2016", func(w *wall) { w.year(2016) }},
}

const (
	watched   = 30 * time.Second // at each stage
	outage    = 2 * time.Second  // of a real CPU: the longest time without a session
	flakyRun  = 65 * time.Second
	stopGrace = 20 * time.Second
	leash     = 30 * time.Second
	silence   = 75 * time.Second // in which the end of a session is noticed at the latest
)

func TestJumps(t *testing.T) {
	w := newWall(t)
	bin := rig.Binaries(os.Getenv("BELAY_BIN"))
	if _, err := os.Stat(bin.Path("belay-agent")); err != nil {
		t.Fatalf("BELAY_BIN: %v: run make build", err)
	}
	s := newSite(t, bin)

	// The control plane's certificates are of now, the agents start in 1970.
	first := s.enrol(t, "first")
	registry := s.contain(t, first)
	w.never()
	first.start(t)
	second := s.enrol(t, "second", "--transport", "tcp")
	second.start(t)
	loop := newLoop(t, s)
	s.connected(t, first, second)

	keep := s.run(t, first, "keep", nil, container{"script": forever})
	tcp := s.run(t, second, "tcp", nil, container{"script": forever})
	healthy := s.run(t, first, "healthy", nil, container{"script": forever,
		"healthCheck": map[string]any{"command": []any{"CMD", "/bin/true"}, "interval": 5, "retries": 1, "timeout": 30}})
	healthy = s.await(t, healthy.ID, "the task to be healthy", func(now rig.Task) bool { return now.HealthStatus == "HEALTHY" })
	// Without a health check: an emulated machine is busy with one exec for longer than the plugin waits.
	contained := s.run(t, first, "contained", map[string]any{"runtime": "containerd"},
		container{"script": forever, "image": registry + "/" + images.Shell + ":1", "memory": 64})
	leashed := s.run(t, first, "leashed", map[string]any{"disconnect": map[string]any{"stopAfter": int(leash / time.Second)}},
		container{"script": forever, "stopTimeout": 2})
	flaky := s.run(t, first, "flaky", nil, container{"script": forever}, container{"name": "flaky", "essential": false,
		"script":        note(s.dir, "flaky") + fmt.Sprintf("sleep %d; exit 9", flakyRun/time.Second),
		"restartPolicy": map[string]any{"enabled": true, "restartAttemptPeriod": 60}})
	constant := []rig.Task{keep, tcp, healthy, contained, leashed}
	s.watch(t, "1970", constant)

	var short, stubborn, stopping rig.Task
	var asked span
	jumped := filepath.Join(s.dir, "jumped")
	for _, stage := range stages {
		switch stage.name {
		case "2036":
			// Ten years later it has run for seconds, too few to be restarted.
			short = s.run(t, first, "short", nil, container{"script": forever}, container{"name": "short", "essential": false,
				"script":        "while [ ! -e " + jumped + " ]; do sleep 0.2; done; exit 3",
				"restartPolicy": map[string]any{"enabled": true, "restartAttemptPeriod": 60}})
		case "2016":
			ignore := container{"script": "trap : TERM; while :; do sleep 0.2; done", "stopTimeout": int(stopGrace / time.Second)}
			stubborn, stopping = s.run(t, first, "stubborn", nil, ignore), s.run(t, first, "stopping", nil, ignore)
			asked = s.stop(t, stopping.ID)
			moment(stopGrace / 4)
		}
		stage.set(w)
		switch stage.name {
		case "2036":
			if err := os.WriteFile(jumped, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			now := s.await(t, short.ID, "the short run to end", func(now rig.Task) bool { return now.Container("short").LastStatus == "STOPPED" })
			if c := now.Container("short"); c.Attempt != 1 || c.ExitCode == nil || *c.ExitCode != 3 || now.LastStatus != "RUNNING" {
				t.Errorf("a run too short for its restart policy is %+v", now)
			}
		case "2016":
			s.ends(t, stopping, "told to stop in 2036", asked)
			s.ends(t, stubborn, "told to stop in 2016", s.stop(t, stubborn.ID))
			if now := s.describe(t, short.ID); now.Container("short").Attempt != 1 {
				t.Errorf("the short run was restarted after all: %+v", now)
			}
		}
		s.watch(t, stage.name, constant)
	}

	// Away: the count goes on by the time since boot.
	s.control.Kill()
	cut := uptime()
	moment(leash / 3)
	w.year(2036)
	if now := first.task(t, leashed.ID); now.LastStatus != "RUNNING" {
		t.Errorf("%s after the cut, and ten years: %+v", leash/3, now)
	}
	if err := rig.Until(deadline(t, leash+silence+slack()), first.Process, "the task on a leash to stop", func() error {
		if now := first.task(t, leashed.ID); now.LastStatus != "STOPPED" {
			return fmt.Errorf("it is %+v", now)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	took := uptime() - cut
	t.Logf("a task with stopAfter %s stopped %s after the cut", leash, took.Round(100*time.Millisecond))
	if took < leash {
		t.Errorf("it stopped after %s, stopAfter is %s", took, leash)
	}
	if err := s.control.Restart(deadline(t, patience())); err != nil {
		t.Fatal(err)
	}
	s.connected(t, first, second)
	if end := s.await(t, leashed.ID, "the end to be known", stopped); end.StopCode != "DeviceDisconnected" {
		t.Errorf("it ended with %+v", end)
	}
	constant = constant[:len(constant)-1] // without the one on a leash
	s.watch(t, "2036 again", constant)
	w.right()
	s.watch(t, "2026 again", constant)

	// What ran all along is what ran at first, and what crashed took its time.
	s.restarts(t, flaky.ID)
	loop.check(t)
	for _, d := range []*device{first, second, loop.device} {
		b, err := os.ReadFile(d.Log)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(b), "\n") {
			if aboutTLS.MatchString(line) {
				t.Errorf("%s says: %s", d.name, line)
			}
		}
	}
	for _, id := range []string{keep.ID, tcp.ID, healthy.ID, contained.ID, flaky.ID, short.ID} {
		s.stop(t, id)
	}
	for _, id := range []string{keep.ID, tcp.ID, healthy.ID, contained.ID, flaky.ID, short.ID} {
		s.await(t, id, "its end", stopped)
		inOrder(t, "in the end", s.raw(t, "task", "describe", id, "-o", "json"))
	}
}

var aboutTLS = regexp.MustCompile(`(?i)x509|tls|certificate|has expired|not yet valid`)

// restarts checks the starts of a container that a restart policy starts again
// after each run: none too soon, none left out.
func (s *site) restarts(t *testing.T, id string) {
	t.Helper()
	starts := noted(t, s.dir, "flaky")
	now := s.describe(t, id)
	if c := now.Container("flaky"); c.Attempt != len(starts) {
		t.Errorf("it was started %d times, the control plane says %+v", len(starts), c)
	}
	if len(starts) < 3 {
		t.Errorf("it was started only at %v s", starts)
	}
	for i, at := range starts[1:] {
		gap := at - starts[i]
		t.Logf("flaky: start %d came %s after the one before", i+2, gap.Round(100*time.Millisecond))
		if gap < flakyRun || gap > flakyRun+slack() {
			t.Errorf("start %d came %s after the one before, each run takes %s", i+2, gap, flakyRun)
		}
	}
	if last := uptime() - starts[len(starts)-1]; last > flakyRun+slack() {
		t.Errorf("it was last started %s ago", last)
	}
}

// note is a line of shell that appends the time since boot to a file.
func note(dir, name string) string {
	return fmt.Sprintf("read up rest < /proc/uptime; echo $up >> %s; ", filepath.Join(dir, name))
}

// noted reads what note wrote.
func noted(t *testing.T, dir, name string) (at []time.Duration) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Fields(string(b)) {
		up, err := strconv.ParseFloat(line, 64)
		if err != nil {
			t.Fatal(err)
		}
		at = append(at, time.Duration(up*float64(time.Second)))
	}
	return at
}
