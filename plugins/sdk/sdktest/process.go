package sdktest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

func testOutput(t T, r *rig) {
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1},
		r.spec("echo out; echo err >&2; printf 'no newline'"))
	if err := os.WriteFile(req.Stdout, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.runtime.Start(r.ctx(t), req); err != nil {
		t.Fatalf("Start: %v", err)
	}
	r.wantExit(t, req.Attempt, 0)
	r.wantOutput(t, req.Stdout, "before\nout\nno newline")
	r.wantOutput(t, req.Stderr, "err\n")
}

func testOutputWhole(t T, r *rig) {
	// A line of 1 MiB and bytes that are no text.
	req, _ := r.start(t, `head -c 1048576 /dev/zero; echo; printf '\377\376\001'`)
	r.wantExit(t, req.Attempt, 0)
	r.wantOutput(t, req.Stdout, strings.Repeat("\x00", 1<<20)+"\n\xff\xfe\x01")
}

func testFIFO(t T, r *rig) {
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, r.spec("echo out; echo err >&2"))
	read := make(chan string, 2)
	for _, path := range []string{req.Stdout, req.Stderr} {
		os.Remove(path)
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer f.Close()
			var got []byte
			buf := make([]byte, 512)
			deadline := time.Now().Add(r.patience(15 * time.Second))
			_ = f.SetReadDeadline(deadline)
			for len(got) < 4 && time.Now().Before(deadline) {
				n, err := f.Read(buf)
				got = append(got, buf[:n]...)
				if err == io.EOF { // nobody has opened it for writing yet, or no more
					<-time.After(20 * time.Millisecond)
				} else if err != nil {
					break
				}
			}
			read <- string(got)
		}()
	}
	if _, err := r.runtime.Start(r.ctx(t), req); err != nil {
		t.Fatalf("Start: %v", err)
	}
	got := []string{<-read, <-read}
	slices.Sort(got)
	if !slices.Equal(got, []string{"err\n", "out\n"}) {
		t.Errorf("the readers of the FIFOs got %q", got)
	}
	r.wantExit(t, req.Attempt, 0)
}

func testEnvironment(t T, r *rig) {
	spec := r.spec(`echo "$A|$B|$C"; pwd; id -u; id -g`)
	spec.Env = []string{"A=first", "B=two words 'and' \"quotes\" $HOME", "A=last", "C="}
	spec.WorkingDir = "/tmp"
	want := "last|two words 'and' \"quotes\" $HOME|\n/tmp\n"
	uid, gid := "0", "0"
	if !r.info.Images {
		uid, gid = fmt.Sprint(os.Getuid()), fmt.Sprint(os.Getgid())
	}
	if r.opts.User != "" {
		spec.User = r.opts.User
		uid, gid, _ = strings.Cut(r.opts.User, ":")
	}
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, spec)
	if _, err := r.runtime.Start(r.ctx(t), req); err != nil {
		t.Fatalf("Start: %v", err)
	}
	r.wantExit(t, req.Attempt, 0)
	r.wantOutput(t, req.Stdout, want+uid+"\n"+gid+"\n")
}

func testOrphan(t T, r *rig) {
	req, _ := r.start(t, "sleep 30 & exit 8")
	begun := time.Now()
	r.wantExit(t, req.Attempt, 8)
	if took := time.Since(begun); took > r.patience(10*time.Second) {
		t.Errorf("the exit was seen only after %s", took)
	}
}

// testDescendants looks for what a container started, by a mark in its
// command line, once it was stopped and removed.
func testDescendants(t T, r *rig) {
	mark := fmt.Sprintf("86400.%d", rand.Int32())
	req, _ := r.start(t, "sleep "+mark+" & (sleep "+mark+" &) ; echo ready; wait; sleep "+mark)
	r.wantOutput(t, req.Stdout, "ready\n")
	r.eventually(t, "children", func() error {
		if n := len(marked(mark)); n < 2 {
			return fmt.Errorf("%d of 2 run", n)
		}
		return nil
	})
	if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil {
		t.Fatalf("Stop: %v", err)
	}
	if err := r.runtime.Remove(r.ctx(t), req.Attempt); err != nil {
		t.Fatalf("Remove: %v", err)
	}
	r.eventually(t, "what the container started ends with it", func() error {
		if pids := marked(mark); len(pids) > 0 {
			return fmt.Errorf("processes %v still run", pids)
		}
		return nil
	})
}

// marked lists the processes with this very argument.
func marked(arg string) []string {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var pids []string
	for _, d := range dirs {
		b, err := os.ReadFile(d + "/cmdline")
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), arg) {
			pids = append(pids, filepath.Base(d))
		}
	}
	return pids
}

func testExec(t T, r *rig) {
	if !r.info.Exec {
		t.Skip("not supported")
	}
	spec := r.spec(stay)
	spec.Env = []string{"OF=container"}
	req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, spec)
	c, err := r.runtime.Start(r.ctx(t), req)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	exec := func(timeout time.Duration, limit int, command ...string) (sdk.ExecResult, error) {
		return r.runtime.Exec(r.ctx(t), sdk.ExecRequest{Attempt: req.Attempt, Command: command, Env: []string{"ADDED=here"}, Timeout: timeout, MaxOutput: limit})
	}
	for _, c := range []struct {
		name, script string
		limit, code  int
		output       string
	}{
		{"success", "echo fine", 0, 0, "fine\n"},
		{"failure", "echo bad >&2; exit 3", 0, 3, "bad\n"},
		{"environment", `echo "$OF $ADDED"`, 0, 0, "container here\n"},
		{"only the end of long output", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done", 10, 0, "line 1999\n"},
		{"no output", "exit 0", 0, 0, ""},
	} {
		res, err := exec(r.patience(10*time.Second), c.limit, "/bin/sh", "-c", c.script)
		switch {
		case err != nil:
			t.Errorf("%s: %v", c.name, err)
		case res.ExitCode != c.code || string(res.Output) != c.output:
			t.Errorf("%s: exit code %d and output %q, want %d and %q", c.name, res.ExitCode, res.Output, c.code, c.output)
		}
	}
	if res, err := exec(r.patience(10*time.Second), 0, "/no/such/program"); err != nil || res.ExitCode != 127 {
		t.Errorf("a command that is not there: exit code %d, error %v, want 127", res.ExitCode, err)
	}
	begun := time.Now()
	_, err = exec(500*time.Millisecond, 0, "/bin/sh", "-c", "sleep 60")
	wantKind(t, "Exec past its timeout", err, sdk.Deadline)
	if took := time.Since(begun); took > r.patience(8*time.Second) {
		t.Errorf("Exec with a timeout of 0.5 s took %s", took)
	}
	if got, ok := r.find(t, req.Attempt); !ok || got.PID != c.PID {
		t.Errorf("after the execs List has %+v, want pid %d", got, c.PID)
	}
	if got := readFile(t, req.Stdout); got != "started\n" {
		t.Errorf("the container's output is %q: exec output leaked into it", got)
	}
	if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil {
		t.Fatal(err)
	}
	_, err = exec(time.Second, 0, "/bin/sh", "-c", "true")
	wantKind(t, "Exec in an exited attempt", err, sdk.NotFound, sdk.Conflict)
}

func testStats(t T, r *rig) {
	if !r.info.Stats {
		t.Skip("not supported")
	}
	req, _ := r.start(t, `echo started; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 600`)
	r.eventually(t, "Stats", func() error {
		s, err := r.runtime.Stats(r.ctx(t), req.Attempt)
		if err != nil {
			return err
		}
		if s.CPUNanos == 0 || s.MemoryBytes == 0 || s.Pids == 0 {
			return fmt.Errorf("got %+v, want none of it zero but the limit", s)
		}
		return nil
	})
}

func testImages(t T, r *rig) {
	if !r.info.Images {
		t.Skip("not supported")
	}
	if !regexp.MustCompile(`^sha256:[0-9a-f]{64}$`).MatchString(r.image.Digest) {
		t.Errorf("digest is %q", r.image.Digest)
	}
	if r.image.Bytes == 0 || r.image.Reference == "" {
		t.Errorf("image is %+v, want a reference and a size", r.image)
	}
	pull := func(ref string) (sdk.Image, error) {
		returned := false
		defer func() { returned = true }()
		return r.runtime.Pull(r.ctx(t), sdk.PullRequest{Task: newID(), Image: ref, Credentials: r.opts.Credentials}, func(sdk.PullProgress) {
			if returned {
				t.Error("progress was reported after Pull returned")
			}
		})
	}
	again, err := pull(r.opts.Image)
	if err != nil || again.Digest != r.image.Digest {
		t.Errorf("second Pull returned %+v, %v, want digest %s", again, err, r.image.Digest)
	}
	name, _, _ := strings.Cut(r.image.Reference, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	if pinned, err := pull(name + "@" + r.image.Digest); err != nil || pinned.Digest != r.image.Digest {
		t.Errorf("Pull by digest returned %+v, %v", pinned, err)
	}
	_, err = pull(name + ":no-such-tag")
	wantKind(t, "Pull of a tag that is not there", err, sdk.NotFound)
	_, err = pull("NOT A reference")
	wantKind(t, "Pull of no reference", err, sdk.Invalid)
}

func testPorts(t T, r *rig) {
	if !slices.Contains(r.info.Networks, sdk.NetworkBridge) || r.opts.Network != sdk.NetworkBridge {
		t.Skip("no bridge network")
	}
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	start := func() (sdk.StartRequest, sdk.Container, error) {
		spec := r.spec(stay)
		spec.Ports = []sdk.PortMapping{{Name: "web", Protocol: "tcp", ContainerPort: 80, HostPort: port}}
		req := r.request(t, sdk.Attempt{Task: r.task(t), Container: "main", Number: 1}, spec)
		c, err := r.runtime.Start(r.ctx(t), req)
		return req, c, err
	}
	_, _, err = start()
	wantKind(t, "Start with a port that a process of the host has", err, sdk.Conflict)
	l.Close()
	req, c, err := start()
	if err != nil {
		t.Fatalf("Start with a free port: %v", err)
	}
	if len(c.Ports) != 1 || c.Ports[0].HostPort != port || c.IP == "" {
		t.Errorf("Start returned ports %+v and address %q, want port %d and an address", c.Ports, c.IP, port)
	}
	_, _, err = start()
	wantKind(t, "Start with a port that another container has", err, sdk.Conflict)
	if _, err := r.runtime.Stop(r.ctx(t), req.Attempt, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.runtime.Remove(r.ctx(t), req.Attempt); err != nil {
		t.Fatal(err)
	}
	if _, _, err = start(); err != nil {
		t.Errorf("Start with a port that was given back: %v", err)
	}
}
