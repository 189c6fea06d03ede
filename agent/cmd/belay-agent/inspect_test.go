package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/agent/internal/host"
	"github.com/belay-edge/belay/agent/internal/localapi"
)

// device17 is a running agent as it tells of itself.
type device17 struct{}

func (device17) Status() localapi.Status { return localapi.Status{} }

func (device17) Tasks() ([]localapi.Task, error) {
	return []localapi.Task{
		{ID: strings.Repeat("a1", 16), Family: "eye", Revision: 3, Runtime: "containerd", LastStatus: "RUNNING", DesiredStatus: "RUNNING",
			Containers: []localapi.Container{
				{Name: "detect", LastStatus: "RUNNING", Devices: []string{"nvidia/GPU-8f3b", "usb-cameras/1-1.2"}},
				{Name: "log", LastStatus: "RUNNING"}}},
		{ID: strings.Repeat("b2", 16), Family: "web", Revision: 1, Runtime: "process", LastStatus: "PENDING", DesiredStatus: "RUNNING", Note: "waiting for devices",
			Containers: []localapi.Container{}},
	}, nil
}

func (device17) Plugins() []localapi.Plugin {
	return []localapi.Plugin{
		{Name: "containerd", Version: "1.2.0", Kinds: []string{"runtime"}, State: "ready", PID: 321, Restarts: 1, Path: "/p/containerd",
			Checksum: strings.Repeat("0123456789abcdef", 4), Protocol: 2, MemoryBytes: 9<<20 + 1, MemoryMaxBytes: 256 << 20, CPUMaxPercent: 100,
			LastDown: "run plugin containerd: the process ended: killed by signal 9 (SIGKILL)"},
		{Name: "edgetpu", Version: "1.2.0", Kinds: []string{"device"}, State: "ready", PID: 322, Path: "/p/edgetpu",
			Checksum: strings.Repeat("fedcba9876543210", 4), Protocol: 2, MemoryBytes: 3 << 20, MemoryMaxBytes: 64 << 20, CPUMaxPercent: 100,
			ProtectionsMissing: []string{"read-only file system (Landlock): this kernel has none: it came with 5.13"}},
		{Name: "vendor", Kinds: []string{}, State: "quarantined", Restarts: 5, Path: "/p/vendor", Checksum: strings.Repeat("77", 32),
			LastError: "run plugin vendor: killed: out of memory (limit 64 MiB)", LastDown: "run plugin vendor: killed: out of memory (limit 64 MiB)"},
	}
}

func inspected(t *testing.T, args ...string) string {
	t.Helper()
	dir := shortDir(t)
	api, err := localapi.Listen(dir, device17{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- api.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	code, out, errs := agentCommand(t, append(args, "--run-dir", dir)...)
	if code != 0 || errs != "" {
		t.Fatalf("belay-agent %s: status %d\n%s", strings.Join(args, " "), code, errs)
	}
	return out
}

func TestPluginsAreShown(t *testing.T) {
	const want = `PLUGIN      KINDS    VERSION  PROTO  CHECKSUM      STATE        RESTARTS  MEMORY
containerd  runtime  1.2.0    2      0123456789ab  ready        1         10 MiB
edgetpu     device   1.2.0    2      fedcba987654  ready        0         3 MiB
vendor      -        -        -      777777777777  quarantined  5         -

containerd: up again after: run plugin containerd: the process ended: killed by signal 9 (SIGKILL)

edgetpu: protection missing: read-only file system (Landlock): this kernel has none: it came with 5.13

vendor: run plugin vendor: killed: out of memory (limit 64 MiB)
`
	out := inspected(t, "plugins")
	if d := cmp.Diff(want, out); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	table, _, _ := strings.Cut(out, "\n\n")
	for line := range strings.Lines(table) {
		if len(strings.TrimRight(line, "\n")) > 80 {
			t.Errorf("a line of the table has %d columns: %s", len(line)-1, line)
		}
	}
	var l struct{ Plugins []localapi.Plugin }
	if err := json.Unmarshal([]byte(inspected(t, "plugins", "-o", "json")), &l); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(device17{}.Plugins(), l.Plugins); d != "" {
		t.Errorf("JSON (-want +got):\n%s", d)
	}
}

func TestTasksShowTheirDevices(t *testing.T) {
	out := inspected(t, "tasks")
	for _, want := range []string{
		strings.Repeat("a1", 16) + "  eye:3       RUNNING  RUNNING  ",
		strings.Repeat("b2", 16) + "  web:1       PENDING  RUNNING  waiting for devices",
		"\n" + strings.Repeat("a1", 16) + ": container detect has nvidia/GPU-8f3b, usb-cameras/1-1.2\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	var l struct{ Tasks []localapi.Task }
	if err := json.Unmarshal([]byte(inspected(t, "tasks", "-o", "json")), &l); err != nil {
		t.Fatal(err)
	}
	tasks, _ := device17{}.Tasks()
	if d := cmp.Diff(tasks, l.Tasks); d != "" {
		t.Errorf("JSON (-want +got):\n%s", d)
	}
}

// What the control plane is told of a plugin that is up again.
func TestLastErrorOutlivesARelaunch(t *testing.T) {
	for _, c := range []struct {
		name string
		s    host.Status
		want string
	}{
		{"well", host.Status{State: host.Ready}, ""},
		{"down", host.Status{State: host.Failed, Error: "no", LastDown: "no"}, "no"},
		{"up again", host.Status{State: host.Ready, LastDown: "it crashed"}, "up again after: it crashed"},
		{"up again, with something else wrong", host.Status{State: host.Ready, Error: "bad file", LastDown: "it crashed"}, "bad file"},
	} {
		if got := lastError(c.s); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
