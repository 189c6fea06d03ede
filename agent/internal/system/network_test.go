package system

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// watched runs WatchNetwork in a network namespace of its own and returns what
// runs commands there, and its calls.
func watched(t *testing.T) (run func(command string), changed <-chan struct{}) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs a network namespace: run as root to test it")
	}
	for _, tool := range []string{"ip", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	calls, space, done := make(chan struct{}, 100), make(chan string, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, and with it the namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			space <- ""
			done <- nil
			return
		}
		space <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		done <- WatchNetwork(ctx, func() { calls <- struct{}{} }, func(bool) {})
	}()
	path := <-space
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("WatchNetwork did not end")
		}
	})
	if path == "" {
		t.Skip("network namespaces cannot be made here")
	}
	return func(command string) {
		t.Helper()
		args := append([]string{"--net=" + path}, strings.Fields(command)...)
		if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
			t.Skipf("%s: %v: %s", command, err, out)
		}
	}, calls
}

func TestNetworkChangesThatCount(t *testing.T) {
	run, changed := watched(t)
	// Without addresses and routes to elsewhere there is nothing yet.
	run("ip link add up0 type veth peer name far0")
	run("ip link set far0 up")
	run("ip link set lo up")
	run("ip link set up0 up")
	run("ip link add name br0 type bridge")
	for _, step := range []struct {
		command string
		counts  bool
	}{
		{"ip addr add 192.0.2.10/24 dev up0", true},
		{"ip addr change 192.0.2.10/24 dev up0 valid_lft 3600 preferred_lft 3600", false},
		{"ip route add default via 192.0.2.1 dev up0", true},
		{"ip addr add 10.88.0.1/16 dev br0", true},
		{"ip link set br0 up", true}, // its route
		// What a container does.
		{"ip link add v0 type veth peer name v1; ip link set v0 master br0; ip link set v0 up; ip link set v1 up; ip link del v0", false},
		{"ip route replace default via 192.0.2.2 dev up0", true},
		{"ip link set up0 down", true},
	} {
		for command := range strings.SplitSeq(step.command, ";") {
			run(command)
		}
		wait := 1500 * time.Millisecond
		if step.counts {
			wait = 10 * time.Second
		}
		select {
		case <-changed:
			if !step.counts {
				t.Errorf("%s: it counts", step.command)
			}
		case <-time.After(wait):
			if step.counts {
				t.Errorf("%s: it does not count", step.command)
			}
		}
		// Some come in two steps.
		for quiet := false; step.counts && !quiet; {
			select {
			case <-changed:
			case <-time.After(1200 * time.Millisecond):
				quiet = true
			}
		}
	}
}
