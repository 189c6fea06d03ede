package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The agent's local API tells of tasks in the shape of apiTask.

func (s *site) local(ctx context.Context, path string, into any) error {
	socket := s.device.root(agentSocket)
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("agent answers %s", resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// held is what the agent says of its tasks, by id.
func (s *site) held(ctx context.Context) (map[string]apiTask, error) {
	var body struct{ Tasks []apiTask }
	if err := s.local(ctx, "/v1/tasks", &body); err != nil {
		return nil, err
	}
	by := map[string]apiTask{}
	for _, t := range body.Tasks {
		by[t.ID] = t
	}
	return by, nil
}

// who is a container's attempt.
type who struct {
	task, container string
	attempt         int
}

func (w who) String() string { return fmt.Sprintf("%s/%s.%d", w.task, w.container, w.attempt) }

// alive finds the first processes of all containers on the device, by what the
// kernel says of them; more than one of an attempt is more than one container.
func alive() map[who][]int {
	type proc struct {
		who
		parent int
	}
	found := map[int]proc{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !strings.Contains(string(line), "-c\x00"+mainMark) {
			continue
		}
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil {
			continue
		}
		var p proc
		for kv := range strings.SplitSeq(string(environ), "\x00") {
			switch name, value, _ := strings.Cut(kv, "="); name {
			case "BELAY_TASK_ID":
				p.task = value
			case "BELAY_CONTAINER_NAME":
				p.container = value
			case "BELAY_ATTEMPT":
				p.attempt, _ = strconv.Atoi(value)
			}
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil || p.task == "" {
			continue
		}
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) < 2 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		p.parent, _ = strconv.Atoi(f[1])
		found[pid] = p
	}
	mains := map[who][]int{}
	for pid, p := range found {
		if above, ok := found[p.parent]; !ok || above.who != p.who {
			mains[p.who] = append(mains[p.who], pid)
		}
	}
	return mains
}

// children lists processes whose parent is pid, with their program's name.
func children(pid int) map[int]string {
	found := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 2 || f[1] != strconv.Itoa(pid) {
			continue
		}
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(e), "cmdline"))
		program, _, _ := strings.Cut(string(line), "\x00")
		child, _ := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		found[child] = filepath.Base(program)
	}
	return found
}

// outer translates a pid of the device into one of the harness.
func (s *site) outer(inner int) int {
	entries, _ := filepath.Glob("/proc/[0-9]*/status")
	deviceNS, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.device.pid.Load()))
	if err != nil {
		return 0
	}
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			rest, ok := strings.CutPrefix(line, "NSpid:")
			if !ok {
				continue
			}
			f := strings.Fields(rest)
			if len(f) != 2 || f[1] != strconv.Itoa(inner) {
				break
			}
			if ns, _ := os.Readlink(filepath.Join(filepath.Dir(e), "ns/pid")); ns == deviceNS {
				pid, _ := strconv.Atoi(f[0])
				return pid
			}
		}
	}
	return 0
}

// alive1 says whether a process is still there and no zombie.
func alive1(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && len(b) > 0
}

// network says what a running container lacks of its network.
func (s *site) network(w who) string {
	id := fmt.Sprintf("%s-%s-%d", w.task, w.container, w.attempt)
	if _, err := os.Stat(s.device.root("/run/belay/plugins/containerd/netns/" + id)); errors.Is(err, fs.ErrNotExist) {
		return "its network namespace is taken away"
	}
	has := addresses(s.device.root("/run/belay-cni"))
	if !slices.ContainsFunc(has, func(a string) bool { return strings.Contains(a, id) }) {
		return fmt.Sprintf("its address is given back: %v", has)
	}
	return ""
}
