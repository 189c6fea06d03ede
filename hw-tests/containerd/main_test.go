// Package containerd tests the containerd plugin against a real containerd
// and a real registry. It needs root and says so when it has none.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/hw-tests/rig"
	"github.com/belay-edge/belay/images"
	plugin "github.com/belay-edge/belay/plugins/containerd"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
)

var shared struct {
	once     sync.Once
	err      error
	dir      string
	ctd      *rig.Containerd
	registry *rig.Registry
}

// bridgeName is this test process's own bridge: others may run beside it.
var (
	bridgeName   = fmt.Sprintf("blyt%d", os.Getpid()%100000)
	bridgeSubnet = fmt.Sprintf("10.231.%d.0/24", os.Getpid()%250)
)

func TestMain(m *testing.M) {
	code := m.Run()
	if _, err := net.InterfaceByName(bridgeName); err == nil {
		if out, err := exec.Command("ip", "link", "del", bridgeName).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "delete bridge: %v: %s\n", err, out)
		}
		for _, rule := range [][]string{
			{"filter", "-D", "FORWARD", "-i", bridgeName, "-j", "ACCEPT"},
			{"filter", "-D", "FORWARD", "-o", bridgeName, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "ACCEPT"},
			{"nat", "-D", "POSTROUTING", "-s", bridgeSubnet, "!", "-d", "224.0.0.0/4", "!", "-o", bridgeName, "-j", "MASQUERADE"},
		} {
			_ = exec.Command("iptables", append([]string{"-w", "10", "-t"}, rule...)...).Run()
		}
		_ = os.RemoveAll(filepath.Join("/run/belay-cni", bridgeName))
		_ = os.Remove(filepath.Join("/run/belay-cni", bridgeName+".lock"))
	}
	if shared.ctd != nil {
		if err := shared.ctd.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close containerd:", err)
			code = max(code, 1)
		}
	}
	if shared.registry != nil {
		_ = shared.registry.Close()
	}
	if shared.dir != "" {
		_ = os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// daemons starts what all tests share, once.
func daemons(t *testing.T) (*rig.Containerd, *rig.Registry) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd does")
	}
	shared.once.Do(func() {
		ctx := context.Background()
		if shared.dir, shared.err = os.MkdirTemp("", "belay-hw"); shared.err != nil {
			return
		}
		if shared.ctd, shared.err = rig.StartContainerd(ctx, filepath.Join(shared.dir, "ctd")); shared.err != nil {
			return
		}
		if shared.registry, shared.err = rig.StartRegistry(ctx, filepath.Join(shared.dir, "reg"), rig.RegistryOptions{}); shared.err != nil {
			return
		}
		_, shared.err = images.Push(ctx, images.Target{Registry: shared.registry.Address, PlainHTTP: true}, options,
			images.Workload, images.Configured, images.Foreign, images.ForeignSingle, images.Shell)
	})
	var missing *rig.Missing
	if errors.As(shared.err, &missing) {
		t.Fatal(missing)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.ctd, shared.registry
}

// built holds the plugin and the images' workloads compiled before, for runs
// of the test binary where there is no Go.
var built = os.Getenv("BELAY_TEST_CONTAINERD_BUILT")

var (
	options  = images.Options{Root: "../..", Built: built}
	hostOnly = images.Options{Root: "../..", HostOnly: true, Built: built}
)

// slow stretches what these tests wait for, on emulated machines.
func slow(d time.Duration) time.Duration {
	n, _ := strconv.Atoi(os.Getenv(sdktest.SlowEnv))
	return d * time.Duration(max(n, 1))
}

// world is one agent's plugin with its directories.
type world struct {
	t     *testing.T
	ctd   *rig.Containerd
	reg   *rig.Registry
	rt    sdk.Runtime
	state string
	run   string
	json  string
}

// newWorld makes a plugin in this process. What a test leaves is removed.
func newWorld(t *testing.T) *world { return newWorldWith(t, "") }

func newWorldWith(t *testing.T, extra string) *world {
	ctd, reg := daemons(t)
	dir, err := os.MkdirTemp("", "bw") // short: the path of a FIFO ends up in messages
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ctd: ctd, reg: reg, state: filepath.Join(dir, "state"), run: filepath.Join(dir, "run")}
	w.json = fmt.Sprintf(`{"address":%q,"bridge":{"name":%q,"subnet":%q}%s}`, ctd.Address, bridgeName, bridgeSubnet, extra)
	for _, d := range []string{w.state, w.run} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w.restart()
	t.Cleanup(func() {
		w.t = t
		w.clear()
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the plugin's directories: %v", err)
		}
	})
	return w
}

// restart is what a new process of the plugin is: one that knows nothing.
func (w *world) restart() {
	w.t.Helper()
	p := plugin.New("test")
	if err := p.Configure(w.ctx(), sdk.Config{StateDir: w.state, RunDir: w.run, JSON: []byte(w.json)}); err != nil {
		w.t.Fatal(err)
	}
	w.rt = p.Runtime()
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
	w.t.Cleanup(cancel)
	return ctx
}

// clear stops and removes everything.
func (w *world) clear() {
	ctx, cancel := context.WithTimeout(context.Background(), slow(time.Minute))
	defer cancel()
	inv, err := w.rt.List(ctx)
	if err != nil {
		w.t.Errorf("List: %v", err)
		return
	}
	for _, c := range inv.Containers {
		if _, err := w.rt.Stop(ctx, c.Attempt, 0); err != nil && !errors.Is(err, sdk.NotFound) {
			w.t.Errorf("Stop: %v", err)
		}
		if err := w.rt.Remove(ctx, c.Attempt); err != nil {
			w.t.Errorf("Remove: %v", err)
		}
	}
	for _, id := range inv.Tasks {
		if err := w.rt.RemoveTask(ctx, id); err != nil {
			w.t.Errorf("RemoveTask: %v", err)
		}
	}
}

var (
	counter int
	counts  sync.Mutex
)

// attempt prepares a fresh task and names its only container's first attempt.
func (w *world) attempt(spec sdk.TaskSpec) sdk.Attempt {
	w.t.Helper()
	counts.Lock()
	counter++
	spec.ID = fmt.Sprintf("%032x", time.Now().UnixNano()+int64(counter))
	counts.Unlock()
	if spec.Network == "" {
		spec.Network = sdk.NetworkNone
	}
	if err := w.rt.PrepareTask(w.ctx(), spec); err != nil {
		w.t.Fatalf("PrepareTask: %v", err)
	}
	return sdk.Attempt{Task: spec.ID, Container: "main", Number: 1}
}

// pull pulls one of our images.
func (w *world) pull(name string) sdk.Image {
	w.t.Helper()
	img, err := w.rt.Pull(w.ctx(), sdk.PullRequest{Image: w.reg.Address + "/" + name + ":1"}, func(sdk.PullProgress) {})
	if err != nil {
		w.t.Fatalf("Pull %s: %v", name, err)
	}
	return img
}

// request builds a StartRequest with output files of its own.
func (w *world) request(a sdk.Attempt, network, image string, command ...string) sdk.StartRequest {
	w.t.Helper()
	img := w.pull(image)
	dir := w.t.TempDir()
	q := sdk.StartRequest{
		Attempt: a, Network: network, Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err"),
		Spec: sdk.ContainerSpec{Image: img.Reference, Digest: img.Digest, Command: command},
	}
	for _, f := range []string{q.Stdout, q.Stderr} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	return q
}

// start starts a request and fails the test if it does not.
func (w *world) start(q sdk.StartRequest) sdk.Container {
	w.t.Helper()
	c, err := w.rt.Start(w.ctx(), q)
	if err != nil {
		w.t.Fatalf("Start: %v", err)
	}
	return c
}

// eventually waits until ok, or fails with what is expected.
func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.After(slow(20 * time.Second))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			w.t.Fatalf("not within %s: %s", slow(20*time.Second), what)
		case <-tick.C:
		}
	}
}

// exit waits for the attempt's exit as List reports it.
func (w *world) exit(a sdk.Attempt) sdk.Container {
	w.t.Helper()
	var c sdk.Container
	w.eventually(a.String()+" exits", func() bool {
		var ok bool
		c, ok = w.find(a)
		return ok && c.State == sdk.StateExited
	})
	return c
}

func (w *world) find(a sdk.Attempt) (sdk.Container, bool) {
	w.t.Helper()
	inv, err := w.rt.List(w.ctx())
	if err != nil {
		w.t.Fatalf("List: %v", err)
	}
	i := slices.IndexFunc(inv.Containers, func(c sdk.Container) bool { return c.Attempt == a })
	if i < 0 {
		return sdk.Container{}, false
	}
	return inv.Containers[i], true
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// readIfThere is "" for a file that is not there.
func readIfThere(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}

// parentOf is the process that started pid: of a container, its shim.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/status", pid))) {
		if v, ok := strings.CutPrefix(line, "PPid:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no parent", pid)
	return 0
}

// wantExit fails unless the container exited with code.
func wantExit(t *testing.T, c sdk.Container, code int) {
	t.Helper()
	if c.State != sdk.StateExited || c.ExitCode == nil || *c.ExitCode != code {
		got := "none"
		if c.ExitCode != nil {
			got = fmt.Sprint(*c.ExitCode)
		}
		t.Fatalf("state %s, exit code %s, reason %q; want exited with %d", c.State, got, c.Reason, code)
	}
}

// wantError fails unless err is of the kind and says all the parts.
func wantError(t *testing.T, err error, kind sdk.ErrorKind, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", kind)
	}
	if got := sdk.KindOf(err); got != kind {
		t.Errorf("error is of kind %s, want %s: %v", got, kind, err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error does not say %q: %v", p, err)
		}
	}
	t.Logf("it says: %v", err)
}
