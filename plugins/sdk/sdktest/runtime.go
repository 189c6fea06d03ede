// Package sdktest checks plugins against the contract of package sdk over the
// real protocol: it launches the built executable the way an agent does, kills
// it where an agent would, and looks at what is left. Runtime and Device run
// the rules as subtests of a test; Check runs them in a plain program. It also
// has an in-memory runtime for tests of what uses runtimes.
package sdktest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
)

// RuntimeOptions say which runtime plugin to check and what it needs.
type RuntimeOptions struct {
	// Executable is the built plugin. Its file name must be the plugin's name.
	Executable string
	// Config is the plugin's own configuration.
	Config json.RawMessage
	// Image is a reference with /bin/sh, sleep, cat, env, id and head in it;
	// needed by runtimes with images only. It is pulled once.
	Image string
	// Credentials for Image's registry.
	Credentials *sdk.Credentials
	// Spec makes a container that runs script by a POSIX shell; nil: Image's
	// or the host's /bin/sh.
	Spec func(script string) sdk.ContainerSpec
	// Network of the tasks; "": the runtime's default.
	Network string
	// User is "uid:gid" to try running as; "" skips that.
	User string
	// MissingProgram is the kind of error for a program that is not there;
	// "": NotFound.
	MissingProgram sdk.ErrorKind
	// HangUp is how often the plugin is killed at moments all over Start; 0: 10.
	HangUp int
	// Slow stretches the suite's patience; 0: what SlowEnv says, or 1.
	Slow int
}

// Runtime runs the conformance suite as subtests of t, a *testing.T, one after
// the other.
func Runtime[S Subtests[S]](t S, o RuntimeOptions) {
	t.Helper()
	runtimeSuite(t, o).runIn(t, under(t))
}

// runtimeSuite is the rules for runtimes. What belongs to all of them is
// cleaned up with t.
func runtimeSuite(t T, o RuntimeOptions) suite {
	r := newRig(t, o)
	s := suite{kill: r.kill, rules: []rule{r.rule(ruleLaunch, r.setUp)}}
	for _, c := range []struct {
		name string
		test func(T, *rig)
	}{
		{ruleByHand, inRuntime(testByHand)},
		{ruleDescription, inRuntime(testDescription)},
		{ruleConfig, inRuntime(testWrongConfig)},
		{ruleEnds, inRuntime(testEnds)},
		{ruleHostDies, inRuntime(testHostDies)},
		{"info is complete and constant", testInfo},
		{"a container starts, exits and reports its exit code", testExitCodes},
		{"a container that has exited ran no longer than it did", testRanFor},
		{"start returns what it made", testStartResult},
		{"start adopts a running attempt", testStartAdoptsRunning},
		{"start adopts an exited attempt", testStartAdoptsExited},
		{"a second attempt leaves the first alone", testSecondAttempt},
		{"stop lets the container end itself", testStopTerm},
		{"stop kills what ignores it", testStopKill},
		{"stop without grace kills at once", testStopNoGrace},
		{"stop of an exited attempt returns its exit", testStopExited},
		{"stop given up does not lose the container", testStopCanceled},
		{"unknown attempts are not found", testNotFound},
		{"remove refuses a running attempt and forgets an exited one", testRemove},
		{"list has everything", testList},
		{"tasks are prepared and removed idempotently", testTasks},
		{"a program that is not there", testMissingProgram},
		{"a network that is not there", testUnsupportedNetwork},
		{"output goes to the two files", testOutput},
		{"output is appended whole", testOutputWhole},
		{"output goes to FIFOs", testFIFO},
		{"environment, working directory and user", testEnvironment},
		{"what devices give is there, or is refused", testGiven},
		{"a left-behind child does not hide the exit", testOrphan},
		{"what a container started ends with it", testDescendants},
		{"attempts run beside each other", testConcurrent},
		{"an event hints at an exit", testEvents},
		{"exec", testExec},
		{"stats", testStats},
		{"images", testImages},
		{"images that were pulled are listed, with their disk", testImagesListed},
		{"an image in use is not removed", testImageInUse},
		{"a removed image is gone until it is pulled again", testImageRemoved},
		{"host ports conflict", testPorts},
		{"plugin killed while a container runs", testCrashWhileRunning},
		{"plugin killed, container exits meanwhile", testCrashWhileExiting},
		{"plugin killed, container is killed meanwhile", testCrashWhileKilled},
		{"starter goes away", testStarterGoesAway},
		{"plugin killed in the middle of start", testCrashInStart},
		{"plugin killed in the middle of a start that is given up", testCrashInStartGivenUp},
		{"plugin killed in the middle of stop", testCrashInStop},
		{"nothing is left over", testNothingLeft},
	} {
		s.rules = append(s.rules, r.rule(c.name, func(t T) { r.ready(t); c.test(t, r) }))
	}
	return s
}

func inRuntime(f func(T, *bench)) func(T, *rig) {
	return func(t T, r *rig) {
		r.crash()
		f(t, r.bench)
	}
}

// rig is a runtime plugin across launches of its process.
type rig struct {
	*bench
	opts RuntimeOptions
	info sdk.RuntimeInfo

	plugin  *host.Plugin
	runtime sdk.Runtime
	image   sdk.Image
}

func newRig(t T, o RuntimeOptions) *rig {
	t.Helper()
	if o.HangUp == 0 {
		o.HangUp = 10
	}
	if o.MissingProgram == "" {
		o.MissingProgram = sdk.NotFound
	}
	return &rig{opts: o, bench: newBench(t, benchOptions{executable: o.Executable, config: o.Config, slow: o.Slow})}
}

// setUp launches the plugin for the first time and learns what it can do.
func (r *rig) setUp(t T) {
	r.launch(t)
	var err error
	r.info, err = r.runtime.Info(r.ctx(t))
	if err != nil {
		t.Fatalf("Info: %v", err)
	}
	if r.opts.Network == "" && len(r.info.Networks) > 0 {
		r.opts.Network = r.info.Networks[0]
	}
	if r.info.Images {
		if r.opts.Image == "" {
			t.Fatal("the runtime has images: a reference to one with a shell is needed (RuntimeOptions.Image, --image)")
		}
		r.image, err = r.runtime.Pull(r.ctx(t), sdk.PullRequest{Task: newID(), Image: r.opts.Image, Credentials: r.opts.Credentials}, nil)
		if err != nil {
			t.Fatalf("Pull(%s): %v", r.opts.Image, err)
		}
	}
}

// ready sees to it that the plugin runs, whatever the rule before left.
func (r *rig) ready(t T) {
	t.Helper()
	if r.runtime == nil {
		r.setUp(t)
		return
	}
	select {
	case <-r.plugin.Exited():
		r.launch(t)
	default:
	}
}

// launch starts the plugin's process.
func (r *rig) launch(t T) {
	t.Helper()
	p := r.bench.launch(t)
	rt, ok := p.Runtime()
	if !ok {
		t.Fatalf("plugin %s is not a runtime: kinds %v", p.Info().Name, p.Info().Kinds)
	}
	r.plugin, r.runtime = p, rt
}

// crash kills the plugin as the kernel's memory killer would.
func (r *rig) crash() { r.over(r.plugin) }

func newID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// spec makes a container that runs script.
func (r *rig) spec(script string) sdk.ContainerSpec {
	var s sdk.ContainerSpec
	switch {
	case r.opts.Spec != nil:
		s = r.opts.Spec(script)
	case r.info.Images:
		s.EntryPoint, s.Command = []string{"/bin/sh", "-c"}, []string{script}
	default:
		s.Command = []string{"/bin/sh", "-c", script}
	}
	if r.info.Images && s.Image == "" {
		s.Image, s.Digest = r.image.Reference, r.image.Digest
	}
	return s
}

// task prepares a new task and sees to its end.
func (r *rig) task(t T) string {
	t.Helper()
	id := newID()
	err := r.runtime.PrepareTask(r.ctx(t), sdk.TaskSpec{ID: id, Family: "sdktest", Network: r.opts.Network, Containers: []string{"main"}})
	if err != nil {
		t.Fatalf("PrepareTask: %v", err)
	}
	t.Cleanup(func() { r.cleanUp(t, id) })
	return id
}

func (r *rig) cleanUp(t T, task string) {
	t.Helper()
	inv, err := r.runtime.List(r.ctx(t))
	if err != nil {
		t.Errorf("List during clean-up: %v", err)
	}
	for _, c := range inv.Containers {
		if c.Attempt.Task != task {
			continue
		}
		if c.State == sdk.StateRunning {
			if _, err := r.runtime.Stop(r.ctx(t), c.Attempt, 0); err != nil {
				t.Errorf("Stop(%s) during clean-up: %v", c.Attempt, err)
			}
		}
		if err := r.runtime.Remove(r.ctx(t), c.Attempt); err != nil {
			t.Errorf("Remove(%s) during clean-up: %v", c.Attempt, err)
		}
	}
	if err := r.runtime.RemoveTask(r.ctx(t), task); err != nil {
		t.Errorf("RemoveTask during clean-up: %v", err)
	}
}

// request makes a start request with its two output files.
func (r *rig) request(t T, a sdk.Attempt, spec sdk.ContainerSpec) sdk.StartRequest {
	t.Helper()
	dir := t.TempDir()
	req := sdk.StartRequest{Attempt: a, Network: r.opts.Network, Spec: spec,
		Stdout: filepath.Join(dir, "stdout"), Stderr: filepath.Join(dir, "stderr")}
	for _, p := range []string{req.Stdout, req.Stderr} {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return req
}

// start starts script as the first attempt of a container of a new task.
func (r *rig) start(t T, script string) (sdk.StartRequest, sdk.Container) {
	t.Helper()
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, r.spec(script))
	c, err := r.runtime.Start(r.ctx(t), req)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	return req, c
}

// find looks an attempt up in List.
func (r *rig) find(t T, a sdk.Attempt) (sdk.Container, bool) {
	t.Helper()
	inv, err := r.runtime.List(r.ctx(t))
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	i := slices.IndexFunc(inv.Containers, func(c sdk.Container) bool { return c.Attempt == a })
	if i < 0 {
		return sdk.Container{}, false
	}
	return inv.Containers[i], true
}

// exit waits until List has the attempt's exit.
func (r *rig) exit(t T, a sdk.Attempt) sdk.Container {
	t.Helper()
	var c sdk.Container
	r.eventually(t, fmt.Sprintf("%s exits", a), func() error {
		var ok bool
		switch c, ok = r.find(t, a); {
		case !ok:
			return fmt.Errorf("List does not have it")
		case c.State != sdk.StateExited:
			return fmt.Errorf("it is %s", c.State)
		}
		return nil
	})
	return c
}

// wantExit waits for the attempt's exit and checks its code.
func (r *rig) wantExit(t T, a sdk.Attempt, code int) {
	t.Helper()
	checkExit(t, "List", r.exit(t, a), code)
}

func checkExit(t T, from string, c sdk.Container, code int) {
	t.Helper()
	switch {
	case c.State != sdk.StateExited:
		t.Errorf("%s: state is %q, want exited", from, c.State)
	case c.ExitCode == nil:
		t.Errorf("%s: exit code is unknown (reason %q), want %d", from, c.Reason, code)
	case *c.ExitCode != code:
		t.Errorf("%s: exit code is %d, want %d", from, *c.ExitCode, code)
	}
	if c.PID != 0 {
		t.Errorf("%s: an exited container has pid %d, want 0", from, c.PID)
	}
}

// wantOutput waits until a file holds exactly want.
func (r *rig) wantOutput(t T, path, want string) {
	t.Helper()
	r.eventually(t, filepath.Base(path), func() error {
		if got := readFile(t, path); got != want {
			return fmt.Errorf("it holds %.80q, want %.80q", got, want)
		}
		return nil
	})
}

func readFile(t T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// gone waits until no process has this pid of the host, or only a zombie.
func (r *rig) gone(t T, pid int) {
	t.Helper()
	r.eventually(t, fmt.Sprintf("process %d ends", pid), func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return nil
		}
		if i := slices.Index(b, ')'); i >= 0 && i+2 < len(b) && (b[i+2] == 'Z' || b[i+2] == 'X') {
			return nil
		}
		return fmt.Errorf("it is there")
	})
}
