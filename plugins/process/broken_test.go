package process_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/process"
	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

const goodRuntime = "rt-good"

// brokenRuntimes are runtimes with one defect each, and the rule of the
// conformance suite that it breaks.
var brokenRuntimes = map[string]string{
	"rt-other-name":           "it starts, under the name of its file",
	"rt-serves-anyone":        "run by hand it says what it is and ends",
	"rt-inconstant":           "what it says about itself is complete and constant",
	"rt-takes-any-config":     "a wrong configuration is refused, its key named",
	"rt-does-not-end":         "it ends when it is asked to",
	"rt-outlives-its-host":    "it ends when its host dies",
	"rt-no-version":           "info is complete and constant",
	"rt-clamps-exit-codes":    "a container starts, exits and reports its exit code",
	"rt-counts-on":            "a container that has exited ran no longer than it did",
	"rt-forgets-digest":       "start returns what it made",
	"rt-relabels-adopted":     "start adopts a running attempt",
	"rt-renames-exited":       "start adopts an exited attempt",
	"rt-muddles-attempts":     "a second attempt leaves the first alone",
	"rt-stops-late":           "stop lets the container end itself",
	"rt-impatient":            "stop kills what ignores it",
	"rt-slow-kill":            "stop without grace kills at once",
	"rt-forgets-on-stop":      "stop of an exited attempt returns its exit",
	"rt-kills-when-given-up":  "stop given up does not lose the container",
	"rt-stats-of-nobody":      "unknown attempts are not found",
	"rt-removes-anything":     "remove refuses a running attempt and forgets an exited one",
	"rt-loses-busy-tasks":     "list has everything",
	"rt-prepares-once":        "tasks are prepared and removed idempotently",
	"rt-missing-internal":     "a program that is not there",
	"rt-any-network":          "a network that is not there",
	"rt-truncates":            "output goes to the two files",
	"rt-cuts-lines":           "output is appended whole",
	"rt-no-fifo":              "output goes to FIFOs",
	"rt-no-working-dir":       "environment, working directory and user",
	"rt-drops-edits":          "what devices give is there, or is refused",
	"rt-waits-for-children":   "a left-behind child does not hide the exit",
	"rt-leaves-children":      "what a container started ends with it",
	"rt-one-start":            "attempts run beside each other",
	"rt-silent":               "an event hints at an exit",
	"rt-exec-head":            "exec",
	"rt-no-pids":              "stats",
	"rt-pulls-anything":       "images",
	"rt-hides-images":         "images that were pulled are listed, with their disk",
	"rt-removes-used-images":  "an image in use is not removed",
	"rt-keeps-images":         "a removed image is gone until it is pulled again",
	"rt-shares-ports":         "host ports conflict",
	"rt-renames-adopted":      "plugin killed while a container runs",
	"rt-loses-exits":          "plugin killed, container exits meanwhile",
	"rt-loses-signals":        "plugin killed, container is killed meanwhile",
	"rt-starts-twice":         "starter goes away",
	"rt-refuses-half-started": "plugin killed in the middle of start",
	"rt-ghosts":               "plugin killed in the middle of a start that is given up",
	"rt-loses-stops":          "plugin killed in the middle of stop",
	"rt-leaves-task":          "nothing is left over",
}

const (
	fakeImage  = "test.example/shell:1"
	fakeDigest = "sha256:00000000000000000000000000000000000000000000000000000000000000aa"
)

// flawed is the process runtime, made to look like one with images and a
// bridge so that every rule can be tried, with one defect or none.
type flawed struct {
	*process.Plugin
	sdk.Runtime
	mode, state string

	mu       sync.Mutex
	known    map[sdk.Attempt]string // started or adopted by this process: the script
	stopped  map[sdk.Attempt]bool
	prepared map[string]bool
	ports    map[sdk.Attempt][]sdk.PortMapping
	ghosts   []sdk.Container
	starting int
	listed   int // exited containers, so far
}

// plugin keeps the two embedded types' Info apart.
type flawedPlugin struct{ f *flawed }

func pretend(mode string) {
	p := process.New("test")
	plugin := flawedPlugin{&flawed{Plugin: p, Runtime: p.Runtime(), mode: mode, known: map[sdk.Attempt]string{},
		stopped: map[sdk.Attempt]bool{}, prepared: map[string]bool{}, ports: map[sdk.Attempt][]sdk.PortMapping{}}}
	own := map[string]bool{"rt-serves-anyone": true, "rt-does-not-end": true, "rt-outlives-its-host": true}
	if byHand := os.Getenv("BELAY_PLUGIN") == ""; byHand && mode == "rt-serves-anyone" {
		onAndOn()
	} else if byHand || !own[mode] {
		serve.Main(plugin)
	}
	// The main function of somebody who did not use serve.Main.
	var asked atomic.Bool
	if mode != "rt-outlives-its-host" {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			<-time.After(time.Second)
			if !asked.Load() || mode != "rt-does-not-end" {
				os.Exit(0)
			}
		}()
	}
	_ = serve.Run(context.Background(), plugin, serve.Options{Dir: os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), HostVersions: "2"})
	asked.Store(true)
	if mode == "rt-does-not-end" {
		onAndOn()
	}
}

func (p flawedPlugin) Info() sdk.Info {
	i := p.f.Plugin.Info()
	switch i.Name = p.f.mode; p.f.mode {
	case "rt-other-name":
		i.Name = "another"
	case "rt-inconstant":
		i.Version = strconv.Itoa(os.Getpid())
	}
	return i
}

func (p flawedPlugin) Configure(ctx context.Context, c sdk.Config) error {
	p.f.state = c.StateDir
	if p.f.mode == "rt-takes-any-config" {
		table := map[string]json.RawMessage{}
		if err := json.Unmarshal(c.JSON, &table); err != nil {
			return err
		}
		delete(table, "no_such_key")
		c.JSON, _ = json.Marshal(table)
	}
	return p.f.Plugin.Configure(ctx, c)
}

func (p flawedPlugin) Runtime() sdk.Runtime { return p.f }

func (f *flawed) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	i, err := f.Runtime.Info(ctx)
	i.Images, i.Networks = true, []string{sdk.NetworkBridge, sdk.NetworkHost}
	if f.mode == "rt-no-version" {
		i.Version = ""
	}
	return i, err
}

func (f *flawed) network(name string) string {
	if name == sdk.NetworkBridge || f.mode == "rt-any-network" {
		return sdk.NetworkHost
	}
	return name
}

func (f *flawed) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	f.mu.Lock()
	again := f.prepared[t.ID]
	f.prepared[t.ID] = true
	f.mu.Unlock()
	if again && f.mode == "rt-prepares-once" {
		return sdk.Errorf(sdk.Conflict, "prepare", "it is prepared")
	}
	t.Network = f.network(t.Network)
	return f.Runtime.PrepareTask(ctx, t)
}

func (f *flawed) Pull(_ context.Context, r sdk.PullRequest, _ func(sdk.PullProgress)) (sdk.Image, error) {
	name, _, _ := strings.Cut(fakeImage, ":")
	defer os.Remove(f.removed())
	switch {
	case strings.Contains(r.Image, " "):
		return sdk.Image{}, sdk.Errorf(sdk.Invalid, "pull", "no reference")
	case r.Image != fakeImage && r.Image != name+"@"+fakeDigest && f.mode != "rt-pulls-anything":
		return sdk.Image{}, sdk.Errorf(sdk.NotFound, "pull", "no such image")
	}
	return sdk.Image{Reference: fakeImage, Digest: fakeDigest, Bytes: 1}, nil
}

// removed is a file that is there while the image is not.
func (f *flawed) removed() string { return filepath.Join(f.state, "test-image-removed") }

func (f *flawed) imageGone() bool {
	_, err := os.Stat(f.removed())
	return err == nil
}

func (f *flawed) Images(ctx context.Context) (sdk.ImageInventory, error) {
	inv := sdk.ImageInventory{Disk: sdk.Disk{TotalBytes: 100, FreeBytes: 50}}
	if f.mode == "rt-hides-images" {
		inv.Disk = sdk.Disk{}
	}
	used, err := f.imageUsed(ctx)
	if f.imageGone() {
		return inv, err
	}
	name, _, _ := strings.Cut(fakeImage, ":")
	inv.Images = []sdk.StoredImage{{Digest: fakeDigest, References: []string{name + "@" + fakeDigest}, Bytes: 1, InUse: used}}
	return inv, err
}

func (f *flawed) imageUsed(ctx context.Context) (bool, error) {
	inv, err := f.Runtime.List(ctx)
	return len(inv.Containers) > 0, err
}

func (f *flawed) RemoveImage(ctx context.Context, digest string) error {
	if digest != fakeDigest {
		return nil
	}
	used, err := f.imageUsed(ctx)
	switch {
	case err != nil:
		return err
	case used && f.mode != "rt-removes-used-images":
		return sdk.Errorf(sdk.Conflict, "remove image", "a container uses it")
	case used, f.mode == "rt-keeps-images":
		return nil
	}
	return os.WriteFile(f.removed(), nil, 0o600)
}

// mark is a file that is there while a call for an attempt goes on. held tells
// one that a killed process left.
func (f *flawed) mark(what string, a sdk.Attempt) (remove func(), held bool) {
	path := filepath.Join(f.state, "test-"+what+"-"+a.Task+"-"+a.Container+"-"+strconv.Itoa(a.Number))
	mine := strconv.Itoa(os.Getpid())
	b, err := os.ReadFile(path)
	if err == nil && string(b) != mine {
		return func() {}, true
	}
	_ = os.WriteFile(path, []byte(mine), 0o600)
	return func() { os.Remove(path) }, false
}

func (f *flawed) Start(ctx context.Context, r sdk.StartRequest) (sdk.Container, error) {
	op := "start " + r.Attempt.String()
	f.mu.Lock()
	_, again := f.known[r.Attempt]
	script := strings.Join(r.Spec.Command, " ")
	f.starting++
	beside := f.starting > 1
	f.mu.Unlock()
	defer func() { f.mu.Lock(); f.starting--; f.mu.Unlock() }()
	done, held := f.mark("start", r.Attempt)
	defer done()
	if !again && f.imageGone() {
		return sdk.Container{}, sdk.Errorf(sdk.NotFound, op, "the image is not here")
	}
	switch f.mode {
	case "rt-refuses-half-started":
		if held {
			return sdk.Container{}, sdk.Errorf(sdk.Conflict, op, "somebody is starting it")
		}
	case "rt-one-start":
		<-time.After(50 * time.Millisecond)
		if beside {
			return sdk.Container{}, sdk.Errorf(sdk.Unavailable, op, "busy")
		}
	case "rt-truncates":
		if st, err := os.Stat(r.Stdout); err == nil && st.Mode().IsRegular() && st.Size() == int64(len("before\n")) {
			_ = os.Truncate(r.Stdout, 0)
		}
	case "rt-cuts-lines":
		r.Spec.Command = []string{strings.ReplaceAll(script, "1048576", "65536")}
	case "rt-waits-for-children":
		r.Spec.Command = []string{strings.ReplaceAll(script, "sleep 30 &", "sleep 30;")}
	case "rt-no-fifo":
		if st, err := os.Stat(r.Stdout); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
			r.Stdout, r.Stderr = "/dev/null", "/dev/null"
		}
	case "rt-drops-edits":
		r.Spec.Devices, r.Spec.DeviceRules, r.Spec.AdditionalGIDs, r.Spec.Hooks, r.Spec.CDIDevices = nil, nil, nil, nil, nil
	case "rt-no-working-dir":
		r.Spec.WorkingDir = ""
	case "rt-leaves-children":
		if i := strings.Index(script, "86400."); i >= 0 {
			child := exec.Command("timeout", "25", "sleep", strings.Fields(script[i:])[0])
			child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			if err := child.Start(); err == nil {
				go func() { _ = child.Wait() }()
			}
		}
	}
	if err := f.takePorts(op, r); err != nil {
		return sdk.Container{}, err
	}
	ports := r.Spec.Ports
	r.Spec.Command = append(slices.Clone(r.Spec.EntryPoint), r.Spec.Command...)
	r.Spec.EntryPoint, r.Spec.Image, r.Spec.Digest, r.Spec.Ports = nil, "", "", nil
	r.Network = f.network(r.Network)
	c, err := f.Runtime.Start(ctx, r)
	if f.mode == "rt-starts-twice" && ctx.Err() != nil {
		if out, err := os.OpenFile(r.Stdout, os.O_APPEND|os.O_WRONLY, 0); err == nil {
			_, _ = out.WriteString("started\n")
			out.Close()
		}
	}
	if err != nil {
		f.mu.Lock()
		delete(f.ports, r.Attempt)
		f.mu.Unlock()
		if f.mode == "rt-missing-internal" && errors.Is(err, sdk.NotFound) {
			err = errors.New("exec: no such file")
		}
		return c, err
	}
	f.mu.Lock()
	f.known[r.Attempt] = script
	f.mu.Unlock()
	c.ImageDigest, c.Ports = fakeDigest, ports
	if len(ports) > 0 {
		c.IP = "127.0.0.1"
	}
	switch {
	case f.mode == "rt-forgets-digest":
		c.ImageDigest = ""
	case again && c.State == sdk.StateRunning && f.mode == "rt-relabels-adopted":
		c.Reason = "adopted"
	case again && c.State == sdk.StateExited && f.mode == "rt-renames-exited":
		c.RuntimeID += "-exited"
	}
	return c, nil
}

// takePorts is what a bridge's plugin would find out.
func (f *flawed) takePorts(op string, r sdk.StartRequest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(r.Spec.Ports) == 0 || f.mode == "rt-shares-ports" {
		return nil
	}
	for a, ports := range f.ports {
		if a != r.Attempt && ports[0].HostPort == r.Spec.Ports[0].HostPort {
			return sdk.Errorf(sdk.Conflict, op, "port taken by %s", a)
		}
	}
	l, err := net.Listen("tcp", ":"+strconv.Itoa(r.Spec.Ports[0].HostPort))
	if err != nil {
		return sdk.Errorf(sdk.Conflict, op, "%w", err)
	}
	l.Close()
	f.ports[r.Attempt] = r.Spec.Ports
	return nil
}

func (f *flawed) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	f.mu.Lock()
	script, known := f.known[a]
	stopped := f.stopped[a]
	f.stopped[a] = true
	f.mu.Unlock()
	before, _ := f.find(ctx, a)
	done, held := f.mark("stop", a)
	defer done()
	switch {
	case f.mode == "rt-impatient" && grace > 0 && grace < 2*time.Second:
		grace = time.Millisecond
	case f.mode == "rt-slow-kill" && grace == 0 && !stopped && strings.Contains(script, "trap '' TERM"):
		<-time.After(9 * time.Second)
	}
	c, err := f.Runtime.Stop(ctx, a, grace)
	c.ImageDigest = fakeDigest
	switch {
	case f.mode == "rt-kills-when-given-up" && ctx.Err() != nil:
		_, _ = f.Runtime.Stop(context.WithoutCancel(ctx), a, 0)
	case f.mode == "rt-stops-late" && grace >= 10*time.Second && grace < time.Minute:
		<-time.After(11 * time.Second)
	case f.mode == "rt-forgets-on-stop" && known && before.State == sdk.StateExited:
		c.ExitCode = nil
	case f.mode == "rt-loses-stops" && held:
		c.ExitCode = nil
	}
	return c, err
}

func (f *flawed) find(ctx context.Context, a sdk.Attempt) (sdk.Container, bool) {
	inv, err := f.Runtime.List(ctx)
	i := slices.IndexFunc(inv.Containers, func(c sdk.Container) bool { return c.Attempt == a })
	if err != nil || i < 0 {
		return sdk.Container{}, false
	}
	return inv.Containers[i], true
}

func (f *flawed) Remove(ctx context.Context, a sdk.Attempt) error {
	c, _ := f.find(ctx, a)
	if f.mode == "rt-removes-anything" && c.State == sdk.StateRunning {
		return nil
	}
	err := f.Runtime.Remove(ctx, a)
	if err != nil {
		return err
	}
	done, held := f.mark("start", a)
	done()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.ports, a)
	if f.mode == "rt-ghosts" && held {
		f.ghosts = append(f.ghosts, sdk.Container{Attempt: a, RuntimeID: "ghost", State: sdk.StateExited})
	}
	return nil
}

func (f *flawed) List(ctx context.Context) (sdk.Inventory, error) {
	inv, err := f.Runtime.List(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range inv.Containers {
		c := &inv.Containers[i]
		c.ImageDigest = fakeDigest
		_, known := f.known[c.Attempt]
		later := func(d sdk.Container) bool {
			return d.Attempt.Task == c.Attempt.Task && d.Attempt.Container == c.Attempt.Container && d.Attempt.Number > c.Attempt.Number
		}
		code := -1
		if c.ExitCode != nil {
			code = *c.ExitCode
		}
		switch {
		case f.mode == "rt-clamps-exit-codes" && code == 255:
			code = 127
			c.ExitCode = &code
		case f.mode == "rt-counts-on" && c.State == sdk.StateExited:
			f.listed++
			c.RanFor += time.Duration(f.listed)
		case f.mode == "rt-muddles-attempts" && slices.ContainsFunc(inv.Containers, later):
			c.ExitCode = nil
		case f.mode == "rt-renames-adopted" && !known && c.State == sdk.StateRunning:
			c.RuntimeID += "-adopted"
		case f.mode == "rt-loses-exits" && !known && code == 11,
			f.mode == "rt-loses-signals" && !known && code == 137:
			c.ExitCode = nil
		case f.mode == "rt-loses-busy-tasks" && c.Attempt.Container == "side-car_2":
			inv.Tasks = slices.DeleteFunc(inv.Tasks, func(id string) bool { return id == c.Attempt.Task })
		}
	}
	if f.mode == "rt-leaves-task" {
		inv.Tasks = append(inv.Tasks, strings.Repeat("f", 32))
	}
	inv.Containers = append(inv.Containers, f.ghosts...)
	f.ghosts = nil
	return inv, err
}

func (f *flawed) Events(ctx context.Context, hint func(sdk.Attempt)) error {
	if f.mode == "rt-silent" {
		<-ctx.Done()
		return ctx.Err()
	}
	return f.Runtime.Events(ctx, hint)
}

func (f *flawed) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	s, err := f.Runtime.Stats(ctx, a)
	switch {
	case f.mode == "rt-stats-of-nobody" && errors.Is(err, sdk.NotFound):
		return sdk.Stats{}, nil
	case f.mode == "rt-no-pids":
		s.Pids = 0
	}
	return s, err
}

func (f *flawed) Exec(ctx context.Context, r sdk.ExecRequest) (sdk.ExecResult, error) {
	limit := r.MaxOutput
	if f.mode == "rt-exec-head" {
		r.MaxOutput = 0
	}
	res, err := f.Runtime.Exec(ctx, r)
	if f.mode == "rt-exec-head" && limit > 0 && len(res.Output) > limit {
		res.Output = res.Output[:limit]
	}
	return res, err
}

// onAndOn never returns. A plain select{} would end a program without cgo, which
// notices that nothing can happen any more.
func onAndOn() {
	for {
		<-time.After(time.Hour)
	}
}
