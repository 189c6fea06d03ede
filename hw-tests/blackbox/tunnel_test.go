package blackbox

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// ownNetwork moves the test, and all it starts from here on, into a network
// namespace of its own, which ends with them. Every process has to be started
// by the test's own goroutine.
func ownNetwork(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs a network namespace: run as root to test it")
	}
	for _, tool := range []string{"nft", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("network namespaces cannot be made here: %v", err)
	}
	command(t, "ip", "link", "set", "lo", "up")
	if out, err := exec.Command("nft", "list", "ruleset").CombinedOutput(); err != nil {
		t.Skipf("nftables do not work here: %v: %s", err, out)
	}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(deadline(t, patience), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// blockUDP drops what goes to and comes from a UDP port, on its way in: the
// sender does not learn of it.
func blockUDP(t *testing.T, port string) (unblock func()) {
	t.Helper()
	command(t, "nft", "add", "table", "inet", "belaytest")
	command(t, "nft", "add", "chain", "inet", "belaytest", "in", "{ type filter hook input priority 0; }")
	for _, end := range []string{"dport", "sport"} {
		command(t, "nft", "add", "rule", "inet", "belaytest", "in", "udp", end, port, "drop")
	}
	return func() {
		t.Helper()
		command(t, "nft", "delete", "table", "inet", "belaytest")
	}
}

// linkOf is what the agent says of its link.
func linkOf(ctx context.Context, a *rig.Agent) (transport string, err error) {
	out, err := exec.CommandContext(ctx, a.Bin.Path("belay-agent"), "status", "--run-dir", a.RunDir, "-o", "json").Output()
	if err != nil {
		return "", err
	}
	var s struct {
		Link struct {
			Connected bool
			Transport string
		}
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return "", err
	}
	if !s.Link.Connected {
		return "", fmt.Errorf("not connected: %s", out)
	}
	return s.Link.Transport, nil
}

// over waits until the agent's link is over a transport, and says how long it
// took.
func over(t *testing.T, a *rig.Agent, transport string) time.Duration {
	t.Helper()
	began := time.Now()
	if err := rig.Until(deadline(t, 30*time.Second), a.Process, "the link to be over "+transport, func() error {
		got, err := linkOf(deadline(t, 5*time.Second), a)
		if err == nil && got != transport {
			err = fmt.Errorf("it is over %s", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}

const probeInterval = 2 * time.Second

// churning are containers of which one exits every 4 s, at other times for each
// n: with some tasks of them there are statuses under way all the time.
func churning(n int) []container {
	all := []container{{"name": "stay", "script": "exec sleep 600", "essential": true}}
	for i := range 9 {
		all = append(all, container{"name": fmt.Sprintf("c%d", i), "script": fmt.Sprintf("exec sleep %d", 1+i*4+n), "essential": false})
	}
	return all
}

// TestBlockedUDP: UDP is blocked at the start, freed, blocked under a session,
// freed again, while the statuses of a task change all the time.
func TestBlockedUDP(t *testing.T) {
	ownNetwork(t)
	control := newControl(t, "--log-level", "debug")
	_, port, err := net.SplitHostPort(control.Addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{Control: control, runtime: "process", dir: tempDir(t), cli: control.CLI()}
	unblock := blockUDP(t, port)
	var began time.Time
	s.agent = newDevice(t, s.cli, s.dir, func(a *rig.Agent) {
		a.Config, a.Extra = filepath.Join(s.dir, "agent.toml"), []string{"--log-level", "debug"}
		text := fmt.Sprintf("[tunnel]\nprobe_first = %q\nprobe_most = %q\n", probeInterval, probeInterval)
		// The link begins once the plugins are up: those not needed take time.
		for _, p := range []string{"containerd", "docker", "edgetpu", "nvidia"} {
			text += fmt.Sprintf("[plugins.%s.belay]\nenabled = false\n", p)
		}
		if err := os.WriteFile(a.Config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
	})
	over(t, s.agent, "tcp")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("with UDP blocked, the agent was connected %s after its start, want 5 s", took)
	} else {
		t.Logf("UDP blocked at start: over TCP after %s", took)
	}
	ids, err := s.cli.Connected(deadline(t, patience), cluster, 1, s.runtime)
	if err != nil {
		t.Fatal(err)
	}
	s.instance = ids[0]
	t.Cleanup(func() { s.sweep(t) })
	var churn []rig.Task
	for i := range 4 {
		churn = append(churn, s.run(t, fmt.Sprintf("churn%d", i), churning(i)...))
	}
	for round := range 3 {
		unblock()
		if took := over(t, s.agent, "quic"); took > probeInterval+time.Second {
			t.Errorf("round %d: back on QUIC %s after UDP was freed, want the probe interval of %s", round, took, probeInterval)
		} else {
			t.Logf("round %d: back on QUIC after %s", round, took)
		}
		trigger := filepath.Join(s.dir, fmt.Sprintf("go%d", round))
		task := s.run(t, fmt.Sprintf("wait%d", round), container{"name": "w", "essential": true,
			"script": "while [ ! -e " + trigger + " ]; do sleep 0.02; done; exit 3"})
		if got, err := linkOf(deadline(t, patience), s.agent); err != nil || got != "quic" {
			t.Fatalf("the link is over %q, %v", got, err)
		}
		unblock = blockUDP(t, port)
		if err := os.WriteFile(trigger, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		s.await(t, task.ID, "the status sent while UDP was blocked", 20*time.Second, stopped)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("round %d: a status was acknowledged %s after UDP was blocked, want 5 s", round, took)
		} else {
			t.Logf("round %d: a status sent into the block arrived over TCP after %s", round, took)
		}
		over(t, s.agent, "tcp")
	}
	unblock()
	over(t, s.agent, "quic")
	for i := range churn {
		if _, err := s.cli.Run(deadline(t, patience), "task", "stop", churn[i].ID); err != nil {
			t.Fatal(err)
		}
		churn[i] = s.await(t, churn[i].ID, "the task to stop", patience, stopped)
	}
	checkStatuses(t, control, s.agent, churn)
}

var (
	takenLine = regexp.MustCompile(`msg="status taken".* task=(\w+) sequence=(\d+) status=(\w+) again=(\w+)`)
	ranks     = map[string]int{"PENDING": 1, "ACTIVATING": 2, "RUNNING": 3, "DEACTIVATING": 4, "STOPPING": 5, "DEPROVISIONING": 6, "STOPPED": 7}
)

// checkStatuses reads in the control plane's log which statuses it stored: of
// each task none twice and none backwards, and of the last one as the device
// has it.
func checkStatuses(t *testing.T, c *rig.Control, a *rig.Agent, tasks []rig.Task) {
	t.Helper()
	text, err := os.ReadFile(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	last, rank := map[string]int{}, map[string]int{}
	stored, again := 0, 0
	for line := range strings.Lines(string(text)) {
		m := takenLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if m[4] == "true" {
			again++ // its acknowledgement was lost; it was not stored
			continue
		}
		stored++
		sequence, _ := strconv.Atoi(m[2])
		if sequence <= last[m[1]] {
			t.Errorf("of task %s, status %d was stored after %d", m[1], sequence, last[m[1]])
		}
		if ranks[m[3]] < rank[m[1]] {
			t.Errorf("task %s went back to %s", m[1], m[3])
		}
		last[m[1]], rank[m[1]] = sequence, ranks[m[3]]
	}
	if stored < 20 {
		t.Errorf("only %d statuses were stored: the test saw too little", stored)
	}
	t.Logf("%d statuses stored, %d came again and were not", stored, again)
	out, err := exec.CommandContext(deadline(t, patience), a.Bin.Path("belay-agent"), "tasks", "--run-dir", a.RunDir, "-o", "json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var held struct {
		Tasks []struct {
			ID         string
			LastStatus string
			Containers []struct {
				Name, LastStatus string
				Attempt          int
			}
		}
	}
	if err := json.Unmarshal(out, &held); err != nil {
		t.Fatal(err)
	}
	for _, h := range held.Tasks {
		i := slices.IndexFunc(tasks, func(t rig.Task) bool { return t.ID == h.ID })
		if i < 0 {
			continue
		}
		task := tasks[i]
		if h.LastStatus != task.LastStatus {
			t.Errorf("the device says %s, the control plane %s", h.LastStatus, task.LastStatus)
		}
		for _, c := range h.Containers {
			if got := task.Container(c.Name); got.Attempt != c.Attempt || got.LastStatus != c.LastStatus {
				t.Errorf("container %s: the device says attempt %d is %s, the control plane %d is %s", c.Name, c.Attempt, c.LastStatus, got.Attempt, got.LastStatus)
			}
		}
	}
}
