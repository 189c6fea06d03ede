package host_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/belay-edge/belay/plugins/sdk/host"
)

// A plugin ends with its host, however the host ended.
func TestPluginDiesWithItsHost(t *testing.T) {
	if os.Getenv("TEST_HOST") != "" {
		p := launch(t, "good")
		fmt.Printf("pid=%d\n", p.PID())
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	self, _ := os.Executable()
	t.Setenv("TMPDIR", t.TempDir()) // the host that is killed cannot clean up
	out, err := runAs(self, "TEST_HOST=1", "-test.run=^TestPluginDiesWithItsHost$")
	i := strings.Index(out, "pid=")
	if i < 0 {
		t.Fatalf("no plugin: %v\n%s", err, out)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(strings.SplitN(out[i+4:], "\n", 2)[0]))
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return
		}
		if time.Now().After(deadline) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("the plugin outlived its host")
		}
		<-time.After(10 * time.Millisecond)
	}
}

// A call that was under way when the host died may finish, writing to stderr
// though nobody reads it.
func TestWorkOutlivesTheHost(t *testing.T) {
	mark := os.Getenv("TEST_MARK")
	if mark != "" {
		o := options(t, "finishes")
		o.Env = append(o.Env, "TEST_MARK="+mark)
		var log syncBuffer
		o.Logger = slog.New(slog.NewTextHandler(&log, nil))
		p, err := host.Launch(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = runtime(t, p).List(context.Background()) }()
		for !strings.Contains(log.String(), "busy") {
			<-time.After(time.Millisecond)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	mark = filepath.Join(t.TempDir(), "mark")
	self, _ := os.Executable()
	cmd := exec.Command(self, "-test.run=^TestWorkOutlivesTheHost$")
	cmd.Env = append(os.Environ(), "TEST_MARK="+mark, "TMPDIR="+t.TempDir())
	if err := cmd.Run(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the host ended with %v", err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		if b, _ := os.ReadFile(mark); string(b) == "done" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the call did not finish")
		}
		<-time.After(10 * time.Millisecond)
	}
}

// Started by hand, a plugin says what it is.
func TestStartedByHand(t *testing.T) {
	self, _ := os.Executable()
	out, err := runAs(self, "TEST_PLUGIN=good")
	if err == nil || !strings.Contains(out, "good 1.2.3-test is a Belay plugin") {
		t.Errorf("%v: %q", err, out)
	}
}
