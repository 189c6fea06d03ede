package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/agent/internal/localapi"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// shortDir is a directory whose path leaves room for the sockets of plugins.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ba")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// enrolled makes a state directory that belongs to an instance of cp.
func enrolled(t *testing.T, dir string, cp *wiretest.ControlPlane) {
	t.Helper()
	e, err := identity.Begin(dir, cp.CA.Pin().String(), func() ([]byte, error) {
		key, err := carrier.NewKey()
		if err != nil {
			return nil, err
		}
		return carrier.EncodeKey(key)
	})
	if err != nil {
		t.Fatal(err)
	}
	err = e.Commit(identity.Instance{
		ID: strings.Repeat("2e", 16), Cluster: "shop", Pin: cp.CA.Pin().String(),
		Addresses: []string{cp.Address()}, KeyFingerprint: "f",
	})
	if err != nil {
		t.Fatal(err)
	}
}

// locked is a buffer that a running command writes to while a test reads.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// eventually waits for what f says, with a deadline.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

func TestRun(t *testing.T) {
	dir := shortDir(t)
	stateDir, runDir, plugins := dir+"/s", dir+"/r", dir+"/p"
	build := exec.Command("go", "build", "-o", plugins+"/idle", "./testdata/idle")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	config := dir + "/agent.toml"
	if err := os.WriteFile(config, []byte("[attributes]\nrack = \"7\"\n[plugins.idle]\naddress = \"/here\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cp := wiretest.NewControlPlane(t)
	enrolled(t, stateDir, cp)

	args := []string{"run", "--config", config, "--state-dir", stateDir, "--run-dir", runDir, "--plugin-dir", plugins, "--log-format", "json"}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var log locked
	ended := make(chan int, 1)
	go func() { ended <- execute(ctx, args, nil, &log, &log) }()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", log.String())
		}
	})

	s := cp.Next(t)
	s.Expect("open")
	hello := s.Expect("hello").GetHello()
	if hello.InstanceId != strings.Repeat("2e", 16) || hello.BootId == "" || hello.Facts.Cpu == 0 ||
		hello.Facts.Attributes["rack"] != "7" || hello.Facts.Attributes["belay.kernel"] == "" || hello.AgentNonce == "" {
		t.Errorf("hello tells too little: %v", hello)
	}
	s.Send(&wire.Frame{Body: &wire.Frame_Welcome{Welcome: &wire.Welcome{
		Version: 1, Incarnation: "i1", ControlVersion: "t", Full: true, Addresses: []string{cp.Address(), "second.example:7443"},
	}}})
	s.Send(&wire.Frame{Body: &wire.Frame_EndOfSet{EndOfSet: &wire.EndOfSet{Sequence: 3, Full: true}}})

	// The control plane hears of the plugin, ready, with the first word.
	ready := func(f *wire.Facts) bool {
		for _, p := range f.GetPlugins() {
			if p.Name == "idle" && p.State == "ready" && p.Version == "1.2.3" && p.Checksum != "" && p.Networks[0] == "host" {
				return f.Attributes["idle.version"] == "1"
			}
		}
		return false
	}
	if !ready(hello.Facts) {
		t.Errorf("the first facts do not have the plugin ready: %v", hello.Facts)
	}
	acked := false
	for known := ready(hello.Facts); !known || !acked; {
		f, err := wire.ReadFrame(s.Control)
		if err != nil {
			t.Fatalf("wait for facts: %v", err)
		}
		if a := f.GetAssignmentAck(); a != nil {
			acked = a.Sequence == 3
		}
		known = known || ready(f.GetFacts())
	}

	ask := func(args ...string) string {
		t.Helper()
		code, out, errs := command(t, "", append(args, "--config", config, "--run-dir", runDir)...)
		if code != 0 {
			t.Fatalf("%v: exit %d, %s", args, code, errs)
		}
		return out
	}
	var status localapi.Status
	eventually(t, "status says connected", func() bool {
		status = localapi.Status{}
		return json.Unmarshal([]byte(ask("status", "-o", "json")), &status) == nil && status.Link.Connected
	})
	if status.Link.Transport != "quic" || status.Cluster != "shop" || len(status.Problems) > 0 {
		t.Errorf("status: %+v", status)
	}
	if out := ask("status"); !strings.Contains(out, "connected to "+cp.Address()+" over quic") {
		t.Errorf("status: %s", out)
	}
	if out := ask("plugins"); !strings.Contains(out, "idle") || !strings.Contains(out, "ready") {
		t.Errorf("plugins: %s", out)
	}
	if out := ask("tasks", "-o", "json"); !strings.Contains(out, `"tasks": []`) {
		t.Errorf("tasks: %s", out)
	}
	var pluginList struct{ Plugins []localapi.Plugin }
	if err := json.Unmarshal([]byte(ask("plugins", "-o", "json")), &pluginList); err != nil || len(pluginList.Plugins) != 1 || pluginList.Plugins[0].PID == 0 {
		t.Fatalf("plugins: %+v, %v", pluginList, err)
	}
	eventually(t, "the control plane's addresses are remembered", func() bool {
		id, err := identity.Load(stateDir)
		return err == nil && len(id.Addresses) == 2
	})

	second := append(args[:len(args):len(args)], "--run-dir", dir+"/r2")
	if code, _, errs := command(t, "", second...); code != exitFailure || !strings.Contains(errs, stateDir) {
		t.Errorf("a second agent on the same state directory: exit %d, %q", code, errs)
	}
	if code, _, errs := command(t, "", "enroll", "--force", "--state-dir", stateDir, "--activation", (&control{ca: cp.CA, addr: cp.Address()}).code(t)); code == 0 || !strings.Contains(errs, "an agent is running") {
		t.Errorf("enrolling anew under a running agent: exit %d, %q", code, errs)
	}

	stop()
	select {
	case code := <-ended:
		if code != 0 {
			t.Errorf("exit %d", code)
		}
	case <-time.After(finalStop + 5*time.Second):
		t.Fatal("it does not stop")
	}
	if _, err := os.Stat(filepath.Join(runDir, localapi.SocketName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket left behind: %v", err)
	}
	if err := syscall.Kill(pluginList.Plugins[0].PID, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the plugin outlived the agent: %v", err)
	}
	if code, _, errs := command(t, "", "status", "--config", config, "--run-dir", runDir); code != exitFailure || !strings.Contains(errs, "no agent is running here") {
		t.Errorf("status without an agent: exit %d, %q", code, errs)
	}
}

func TestCommandLineErrors(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "agent.toml")
	if err := os.WriteFile(bad, []byte("[log]\nlevle = \"info\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cp := wiretest.NewControlPlane(t)
	enrolledDir := filepath.Join(dir, "enrolled")
	enrolled(t, enrolledDir, cp)
	for _, c := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"unknown command", []string{"rnu"}, exitUsage, `unknown command "rnu"`},
		{"unknown flag", []string{"run", "--x"}, exitUsage, "see belay-agent run --help"},
		{"argument", []string{"run", "now"}, exitUsage, `takes no argument, got "now"`},
		{"bad configuration", []string{"run", "--config", bad}, exitUsage, "agent.toml:2: unknown key log.levle"},
		{"missing configuration", []string{"run", "--config", bad + "x"}, exitUsage, "no such file"},
		{"bad transport", []string{"run", "--transport", "pigeon"}, exitUsage, `transport is "pigeon"`},
		{"bad output", []string{"version", "-o", "xml"}, exitUsage, `--output is "xml"`},
		{"not enrolled", []string{"run", "--state-dir", dir + "/none"}, exitFailure, "belay-agent enroll --state-dir " + dir + "/none"},
		{"no plugin directory", []string{"run", "--state-dir", enrolledDir, "--run-dir", dir, "--plugin-dir", dir + "/none"}, exitFailure, "--plugin-dir"},
		{"no agent", []string{"status", "--run-dir", dir + "/none"}, exitFailure, "no agent is running here"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, errs := command(t, "", c.args...)
			if code != c.code || !strings.Contains(errs, c.want) {
				t.Errorf("exit %d, %q; want %d and %q", code, errs, c.code, c.want)
			}
		})
	}
	if code, out, _ := command(t, "", "version"); code != 0 || !strings.HasPrefix(out, "belay-agent ") {
		t.Errorf("version: exit %d, %q", code, out)
	}
}
