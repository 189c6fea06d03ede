package agent

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

func TestTaskRunsToItsExitCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{Cluster: "c", Containers: []*wire.Container{essential("main")}}))
		if st := b.last(); st.GetLastStatus() != Running || st.GetContainers()[0].GetPid() == 0 || st.GetContainers()[0].GetImageDigest() != "sha256:1" {
			t.Fatalf("status %v", st)
		}
		env := strings.Join(b.runtime.started[0].Spec.Env, " ")
		for _, want := range []string{"BELAY_TASK_ID=" + id(1), "BELAY_CONTAINER_NAME=main", "BELAY_CLUSTER=c", "BELAY_INSTANCE_ID=device"} {
			if !strings.Contains(env, want) {
				t.Errorf("environment %q lacks %q", env, want)
			}
		}
		b.runtime.dies("main", 3)
		time.Sleep(time.Second)
		st := b.last()
		if st.GetLastStatus() != Stopped || st.GetStopCode() != CodeEssentialExited || st.GetContainers()[0].GetExitCode() != 3 {
			t.Fatalf("status %v", st)
		}
		if n := len(b.runtime.containers) + len(b.runtime.tasks); n != 0 {
			t.Errorf("the runtime still holds %d things of a stopped task", n)
		}
		b.Acked(id(1), st.GetSequence())
		time.Sleep(2 * time.Hour)
		if snap, err := b.Snapshot(context.Background()); err != nil || len(snap.Tasks) != 0 || b.journal.assignments[id(1)] != nil {
			t.Errorf("after an hour and more: %+v, %v", snap, err)
		}
	})
}

func TestPullIsRetriedWithBackoffAndGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 1)
		b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error {
			return sdk.Errorf(sdk.Unavailable, "pull main:1", "registry is away")
		}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		time.Sleep(reportEvery)
		if st := b.last(); st.GetLastStatus() != Pending || !strings.Contains(st.GetNote(), "registry is away") {
			t.Fatalf("status %v", st)
		}
		time.Sleep(4 * time.Minute)
		want := []string{"0s", "1s", "3s", "7s", "15s", "31s", "1m3s", "2m3s", "3m3s"}
		var got []string
		for _, c := range b.calls() {
			got = append(got, strings.Fields(c)[0])
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("times of the pulls (-want +got):\n%s", d)
		}
		time.Sleep(2 * time.Minute)
		st := b.last()
		if st.GetLastStatus() != Stopped || st.GetStopCode() != CodeFailedToStart || !strings.HasPrefix(st.GetStoppedReason(), "CannotPullContainerError: ") {
			t.Errorf("status %v", st)
		}
	})
}

func TestServiceNeverGivesUpPulling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		var away atomic.Bool
		away.Store(true)
		b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error {
			if away.Load() {
				return sdk.Unavailable
			}
			return nil
		}
		b.assign(running(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}}))
		time.Sleep(24 * time.Hour)
		if st := b.last(); st.GetLastStatus() != Pending {
			t.Fatalf("status %v", st)
		}
		away.Store(false)
		time.Sleep(2 * time.Minute)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Fatalf("status %v", st)
		}
	})
}

func TestDefinitiveFailuresStopTheTaskAtOnce(t *testing.T) {
	for _, kind := range []sdk.ErrorKind{sdk.NotFound, sdk.Unauthorized, sdk.Invalid, sdk.Unsupported} {
		for _, call := range []string{"Pull", "Start"} {
			t.Run(string(kind)+" "+call, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := newBubble(t, 0.5)
					fail := sdk.Errorf(kind, "do it", "cannot")
					if call == "Pull" {
						b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error { return fail }
					} else {
						b.runtime.start = func(sdk.StartRequest) error { return fail }
					}
					b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
					st := b.last()
					if st.GetLastStatus() != Stopped || st.GetStopCode() != CodeFailedToStart || !strings.HasPrefix(st.GetStoppedReason(), "Cannot"+call+"ContainerError: ") {
						t.Errorf("status %v", st)
					}
				})
			})
		}
	}
}

func TestStopEndsDependentsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		web := essential("web")
		web.DependsOn = []*wire.Dependency{{Container: "db", Condition: "START"}}
		web.StopTimeoutS = 7
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("db"), web}}))
		b.last()
		b.assign(&wire.Assignment{Sequence: 2, TaskId: id(1), Desired: "STOPPED", StopReason: "enough"})
		st := b.last()
		if st.GetLastStatus() != Stopped || st.GetStopCode() != CodeUserInitiated || st.GetStoppedReason() != "enough" {
			t.Errorf("status %v", st)
		}
		want := []string{"0s start db/1", "0s start web/1", "0s stop web/1 7s", "0s stop db/1 30s"}
		// The pulls run beside each other, and beside the first start.
		got := slices.DeleteFunc(b.calls(), func(c string) bool { return strings.Contains(c, " pull ") })
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
	})
}

func TestPullUnderWayEndsWhenTheTaskIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.runtime.pull = func(ctx context.Context, _ func(sdk.PullProgress)) error {
			<-ctx.Done()
			return ctx.Err()
		}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		b.last()
		b.assign(&wire.Assignment{Sequence: 2, TaskId: id(1), Desired: "STOPPED"})
		if st := b.last(); st.GetLastStatus() != Stopped {
			t.Errorf("status %v", st)
		}
	})
}

func TestPullWithoutProgressIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		first := true
		b.runtime.pull = func(ctx context.Context, progress func(sdk.PullProgress)) error {
			if !first {
				return nil
			}
			first = false
			for n := range uint64(3) {
				progress(sdk.PullProgress{Layers: 1, Bytes: 10, BytesDone: n})
				time.Sleep(4 * time.Minute)
			}
			<-ctx.Done()
			return ctx.Err()
		}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		time.Sleep(12 * time.Minute)
		if st := b.last(); st.GetContainers()[0].GetPull().GetBytesDone() != 2 {
			t.Errorf("status %v", st)
		}
		time.Sleep(3 * time.Minute)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Errorf("status %v", st)
		}
	})
}

func TestEachStepOfAPullLeftATimerBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.runtime.pull = func(_ context.Context, progress func(sdk.PullProgress)) error {
			for n := range uint64(1000) {
				time.Sleep(time.Second)
				progress(sdk.PullProgress{Bytes: 1000, BytesDone: n})
			}
			return nil
		}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		time.Sleep(20 * time.Minute)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Fatalf("a slow pull that never stalled: %v", st)
		}
		if n := b.clock.stalls.Load(); n > 5 {
			t.Errorf("%d timers of %s were set", n, pullStall)
		}
	})
}

func TestImageThatWasDeletedLaterWasNotPulledAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}}))
		if st := b.last(); st.GetLastStatus() != Running {
			t.Fatalf("status %v", st)
		}
		missing := true
		b.runtime.mu.Lock()
		b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error { missing = false; return nil }
		b.runtime.start = func(sdk.StartRequest) error {
			if missing {
				return sdk.Errorf(sdk.NotFound, "start", "no such image")
			}
			return nil
		}
		b.runtime.mu.Unlock()
		b.runtime.dies("main", 1)
		time.Sleep(5 * time.Second)
		want := []string{"520ms start main/2", "520ms pull main:1@sha256:1", "520ms start main/2"}
		if d := cmp.Diff(want, b.calls()[2:]); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
		if st := b.last(); st.GetLastStatus() != Running || st.GetContainers()[0].GetAttempt() != 2 {
			t.Errorf("status %v", st)
		}
	})
}

func TestHealthCheckKeepsItsIntervalAndRestartsAServiceInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		sick := false
		b.runtime.exec = func() (sdk.ExecResult, error) {
			if sick {
				return sdk.ExecResult{ExitCode: 1}, nil
			}
			return sdk.ExecResult{}, nil
		}
		main := essential("main")
		main.HealthCheck = &wire.HealthCheck{Command: []string{"CMD-SHELL", "true"}, IntervalS: 10, Retries: 2}
		b.assign(running(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{main}}))
		if st := b.last(); st.GetHealth() != HealthUnknown {
			t.Errorf("before the first check: %v", st)
		}
		time.Sleep(11 * time.Second)
		if st := b.last(); st.GetHealth() != HealthHealthy || st.GetContainers()[0].GetHealth() != HealthHealthy {
			t.Errorf("after the first check: %v", st)
		}
		b.runtime.mu.Lock()
		sick = true
		b.runtime.mu.Unlock()
		time.Sleep(20 * time.Second)
		b.runtime.mu.Lock()
		sick = false
		b.runtime.mu.Unlock()
		time.Sleep(10 * time.Second)
		want := []string{"10s exec", "20s exec", "30s exec", "30s stop main/1 30s", "30.5s start main/2", "40.5s exec"}
		if d := cmp.Diff(want, b.calls()[2:]); d != "" {
			t.Errorf("calls (-want +got):\n%s", d)
		}
		if st := b.last(); st.GetLastStatus() != Running || st.GetContainers()[0].GetAttempt() != 2 || st.GetContainers()[0].GetRestarts() != 1 {
			t.Errorf("after the restart: %v", st)
		}
	})
}

func TestUnhealthyStandaloneTaskIsOnlyReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.runtime.exec = func() (sdk.ExecResult, error) {
			return sdk.ExecResult{ExitCode: 1, Output: []byte("trying\nno answer\x1b on 8080\n\n")}, nil
		}
		main := essential("main")
		main.HealthCheck = &wire.HealthCheck{Command: []string{"CMD", "false"}}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{main}}))
		time.Sleep(89 * time.Second)
		if st := b.last(); st.GetHealth() != HealthUnknown {
			t.Errorf("after two failures: %v", st)
		}
		time.Sleep(10 * time.Minute)
		if st := b.last(); st.GetHealth() != HealthUnhealthy || st.GetLastStatus() != Running || st.GetContainers()[0].GetAttempt() != 1 {
			t.Errorf("after three failures: %v", st)
		}
		if note, want := b.last().GetNote(), "main: its health check failed: it ended with 1: no answer  on 8080"; note != want {
			t.Errorf("note %q, want %q", note, want)
		}
	})
}

func TestRestartPolicyWantsTheWholePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		main := essential("main")
		main.RestartPolicy = &wire.RestartPolicy{Enabled: true, AttemptPeriodS: 60, IgnoredExitCodes: []int32{9}}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{main}}))
		time.Sleep(61 * time.Second)
		b.runtime.dies("main", 1)
		time.Sleep(time.Second)
		if st := b.last(); st.GetLastStatus() != Running || st.GetContainers()[0].GetAttempt() != 2 {
			t.Fatalf("after a long run: %v", st)
		}
		time.Sleep(30 * time.Second)
		b.runtime.dies("main", 1)
		time.Sleep(time.Second)
		if st := b.last(); st.GetLastStatus() != Stopped || st.GetContainers()[0].GetAttempt() != 2 {
			t.Errorf("after a short run: %v", st)
		}
	})
}

func TestFullDiskStartsNothingAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}}))
		b.last()
		set := func(broken bool) { _ = b.ask(context.Background(), func(*State) { b.journal.broken = broken }) }
		set(true)
		other := running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}})
		other.TaskId = id(2)
		if err := b.Assign(context.Background(), "one", false, []*wire.Assignment{other}, 2); err == nil {
			t.Error("a set was acknowledged that is not on disk")
		}
		b.runtime.dies("main", 1)
		time.Sleep(time.Minute)
		if st := b.last(); st.GetLastStatus() != Running || !strings.Contains(st.GetNote(), "no space left") {
			t.Errorf("while the disk is full: %v", st)
		}
		if n := len(b.runtime.started); n != 1 {
			t.Errorf("%d starts with a full disk", n)
		}
		set(false)
		time.Sleep(2 * time.Minute)
		if st := b.last(); st.GetContainers()[0].GetAttempt() != 2 || st.GetContainers()[0].GetLastStatus() != Running || st.GetNote() != "" {
			t.Errorf("with room again: %v", st)
		}
	})
}

func TestRefusedAssignmentWasLoggedAsAStateThatCanBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		set := func(broken bool) { _ = b.ask(context.Background(), func(*State) { b.journal.broken = broken }) }
		set(true)
		a := running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}})
		for range 3 { // as the link does
			if b.Assign(context.Background(), "one", false, []*wire.Assignment{a}, 1) == nil {
				t.Error("a set was acknowledged that is not on disk")
			}
			time.Sleep(time.Second)
		}
		set(false)
		b.assign(a)
		b.last()
		for what, want := range map[string]int{
			"assignments cannot be taken over": 1, "assignments are taken over again": 1, "state can be written": 0,
		} {
			if n := b.log.count(what); n != want {
				t.Errorf("logged %d times, want %d: %s", n, want, what)
			}
		}
	})
}

func TestTakenPortIsChosenAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		var tried []int
		b.runtime.start = func(q sdk.StartRequest) error {
			tried = append(tried, q.Spec.Ports[0].HostPort)
			if len(tried) < 3 {
				return sdk.Conflict
			}
			return nil
		}
		main := essential("main")
		main.Ports = []*wire.PortMapping{{ContainerPort: 80}}
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{main}}))
		time.Sleep(10 * time.Second)
		st := b.last()
		if st.GetLastStatus() != Running || len(tried) != 3 || tried[0] == tried[1] {
			t.Fatalf("tried %v: %v", tried, st)
		}
		p := st.GetContainers()[0].GetPorts()[0]
		if int(p.GetHostPort()) != tried[2] || p.GetHostPort() < firstPort || p.GetHostPort() > lastPort {
			t.Errorf("reported %v, tried %v", p, tried)
		}
	})
}

func TestAnotherIncarnationStopsNothingByAbsence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		for n := range uint64(2) {
			if err := b.Assign(context.Background(), "two", true, nil, n); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			if st := b.last(); st.GetLastStatus() != Running {
				t.Fatalf("status %v", st)
			}
		}
		if inc, seq := b.Held(); inc != "two" || seq != 1 {
			t.Errorf("holds %s %d", inc, seq)
		}
		if err := b.Assign(context.Background(), "one", true, nil, 5); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if snap, err := b.Snapshot(context.Background()); err != nil || len(snap.Tasks) != 0 {
			t.Errorf("its own incarnation does not know it: %+v, %v", snap, err)
		}
	})
}

func TestShutdownNamesWhatIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		release := make(chan struct{})
		b.runtime.pull = func(context.Context, func(sdk.PullProgress)) error { <-release; return nil }
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		b.last()
		err := b.stop()
		if err == nil || !strings.Contains(err.Error(), "pull containerd "+id(1)+"/main") {
			t.Errorf("Run: %v", err)
		}
		if err := b.Assign(context.Background(), "one", true, nil, 3); err == nil {
			t.Error("an agent that ended took a set")
		}
		close(release)
		b.stopsOnce()
	})
}

func TestLogsTail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t, 0.5)
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}))
		b.last()
		b.outputs.content[id(1)+"/main/1 stdout"] = "one\ntwo\nthree\n"
		b.outputs.content[id(1)+"/main/1 stderr"] = strings.Repeat("x", 100_000) + "\nlast, unterminated"
		for _, tc := range []struct {
			tail   uint32
			stdout string
			stderr int
		}{{0, "one\ntwo\nthree\n", 100_019}, {2, "two\nthree\n", 100_019}, {1, "three\n", 18}, {9, "one\ntwo\nthree\n", 100_019}} {
			got := map[string]string{}
			err := b.Logs(context.Background(), &wire.LogsRequest{TaskId: id(1), Tail: tc.tail}, func(stream string, data []byte) error {
				got[stream] += string(data)
				return nil
			})
			if err != nil || got["stdout"] != tc.stdout || len(got["stderr"]) != tc.stderr {
				t.Errorf("tail %d: stdout %q, %d bytes of stderr, %v", tc.tail, got["stdout"], len(got["stderr"]), err)
			}
		}
		err := b.Logs(context.Background(), &wire.LogsRequest{TaskId: id(9)}, nil)
		if sdk.KindOf(err) != sdk.NotFound {
			t.Errorf("logs of an unknown task: %v", err)
		}
	})
}
