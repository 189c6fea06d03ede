package blackbox

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// faultsEnv names the variable that makes long tests of faults run: `make
// test-faults` sets it.
const faultsEnv = "BELAY_TEST_FAULTS"

// A detector whose devices change 10,000 times a minute costs a bounded amount
// of traffic and no memory.
func TestTenThousandChangesAMinute(t *testing.T) {
	if os.Getenv(faultsEnv) == "" {
		t.Skip("takes minutes: run make test-faults")
	}
	s := faultySite(t, "dev-changes")
	s.plugin(t, "dev-changes", "ready", patience, ready)
	agent := s.agent.PID()
	port := s.Addr[strings.LastIndexByte(s.Addr, ':')+1:]
	measure := func(what string, d time.Duration) (bytes int) {
		t.Helper()
		sent, memory, spent := sentTo(t, port), rss(t, agent), cpuTime(t, agent)
		select {
		case <-time.After(d):
		case <-s.agent.Done():
			t.Fatal("the agent has ended")
		}
		bytes = sentTo(t, port) - sent
		t.Logf("%s, %s: %d bytes sent, resident %d KiB, before %d, %s of CPU", what, d, bytes, rss(t, agent), memory, cpuTime(t, agent)-spent)
		return bytes
	}
	// The first change is told at once, the next ones 3, 6, 12, ... s apart.
	measure("changes begin", time.Minute)
	settled := rss(t, agent)
	first := measure("changes", time.Minute)
	second := measure("changes", time.Minute)
	grown := rss(t, agent) - settled
	s.heal(t, "dev-changes")
	measure("changes end", time.Minute)
	quiet := measure("none", time.Minute)
	// A message of the facts is about 4 KB; one a minute is what is allowed.
	for _, bytes := range []int{first, second} {
		if bytes-quiet > 32<<10 {
			t.Errorf("%d bytes in a minute of changes, %d in a minute without", bytes, quiet)
		}
	}
	if grown > 4<<10 {
		t.Errorf("the agent has grown by %d KiB in two minutes of changes", grown)
	}
	for _, name := range []string{"process", "rt-good", "dev-good", "dev-changes"} {
		if p := s.plugin(t, name, "ready", patience, ready); p.Restarts != 0 {
			t.Errorf("%s was relaunched: %+v", name, p)
		}
	}
}

// sentTo is how many bytes were sent on TCP connections to a port.
func sentTo(t *testing.T, port string) (sum int) {
	t.Helper()
	out, err := exec.Command("ss", "-tniH", "state", "established", "dport", "=", ":"+port).Output()
	if err != nil {
		t.Fatalf("ss: %v", err)
	}
	for _, word := range strings.Fields(string(out)) {
		if n, ok := strings.CutPrefix(word, "bytes_sent:"); ok {
			bytes, _ := strconv.Atoi(n)
			sum += bytes
		}
	}
	if sum == 0 {
		t.Fatalf("no connection to port %s: %s", port, out)
	}
	return sum
}

// cpuTime a process has taken.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}
