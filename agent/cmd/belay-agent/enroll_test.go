package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// control is a control plane of a few lines: it answers every enrolment with
// what answer returns, and hangs up without one when that is nil.
type control struct {
	ca   *carrier.CA
	addr string

	mu     sync.Mutex
	asked  []*wire.EnrollRequest
	keys   []string
	answer func(n int) *wire.EnrollResponse
}

func newControl(t *testing.T, answer func(n int) *wire.EnrollResponse) *control {
	t.Helper()
	ca, err := carrier.NewCA()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Leaf([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := carrier.Listen(carrier.ListenConfig{Address: "127.0.0.1:0", Tunnel: leaf})
	if err != nil {
		t.Fatal(err)
	}
	c := &control{ca: ca, addr: ln.Addr().String(), answer: answer}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			s, err := ln.Accept(ctx)
			if err != nil {
				return
			}
			serving.Go(func() { c.serve(ctx, s) })
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = ln.Close()
		serving.Wait()
	})
	return c
}

func (c *control) serve(ctx context.Context, s wire.Session) {
	defer s.Close("", "")
	st, err := s.AcceptStream(ctx)
	if err != nil {
		return
	}
	defer st.Close()
	for {
		f, err := wire.ReadFrame(st)
		if err != nil {
			return
		}
		r := f.GetEnrollRequest()
		if r == nil {
			continue
		}
		c.mu.Lock()
		c.asked = append(c.asked, r)
		c.keys = append(c.keys, wire.Fingerprint(s.PeerCertificate()))
		answer := c.answer(len(c.asked))
		c.mu.Unlock()
		if answer != nil {
			_ = wire.WriteFrame(st, &wire.Frame{Body: &wire.Frame_EnrollResponse{EnrollResponse: answer}})
			_, _ = wire.ReadFrame(st) // until the device hangs up
		}
		return
	}
}

func (c *control) code(t *testing.T) string {
	t.Helper()
	text, err := wire.ActivationCode{
		Addresses: []string{c.addr}, Pin: c.ca.Pin(), ID: strings.Repeat("ab", 16), Secret: bytes.Repeat([]byte{7}, 32),
	}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (c *control) seen() (requests []*wire.EnrollRequest, keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked, c.keys
}

func accept(int) *wire.EnrollResponse {
	return &wire.EnrollResponse{InstanceId: strings.Repeat("1f", 16), Cluster: "shop", Addresses: []string{"cp.example:7443"}}
}

func refuse(code, message string) func(int) *wire.EnrollResponse {
	return func(int) *wire.EnrollResponse { return &wire.EnrollResponse{Failure: wire.Failf(code, "%s", message)} }
}

// command runs one command line as a shell would, without any configuration
// of the host's.
func command(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = execute(t.Context(), args, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func TestEnroll(t *testing.T) {
	for _, transport := range []string{"auto", "quic", "tcp"} {
		t.Run(transport, func(t *testing.T) {
			c := newControl(t, accept)
			dir := filepath.Join(t.TempDir(), "state")
			code, stdout, stderr := command(t, "", "enroll", "--state-dir", dir, "--transport", transport, "--activation", c.code(t))
			if code != 0 || !strings.Contains(stdout, "enrolled as "+strings.Repeat("1f", 16)+" in cluster shop") {
				t.Fatalf("exit %d, %q, %q", code, stdout, stderr)
			}
			id, err := identity.Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			asked, keys := c.seen()
			if len(asked) != 1 || id.KeyFingerprint != keys[0] || id.Addresses[0] != c.addr || id.Addresses[1] != "cp.example:7443" || id.Pin != c.ca.Pin().String() {
				t.Errorf("recorded %+v after %d requests with keys %v", id.Instance, len(asked), keys)
			}
			if r := asked[0]; r.HashedMachineId == "" && r.Facts.Attributes["belay.arch"] == "" || r.Facts.Cpu == 0 || r.AgentVersion == "" || r.Facts.ReservedPorts[0].Port != 22 {
				t.Errorf("the control plane was told too little: %v", r)
			}

			code, stdout, stderr = command(t, c.code(t), "enroll", "--state-dir", dir, "--activation", "-", "-o", "json")
			var again struct {
				Instance string
				Already  bool `json:"alreadyEnrolled"`
			}
			if err := json.Unmarshal([]byte(stdout), &again); code != 0 || err != nil || !again.Already || again.Instance != id.ID {
				t.Errorf("a second enrolment: exit %d, %q, %q", code, stdout, stderr)
			}
			if asked, _ := c.seen(); len(asked) != 1 {
				t.Error("an enrolled device asked again")
			}

			other := newControl(t, accept)
			code, _, stderr = command(t, "", "enroll", "--state-dir", dir, "--activation", other.code(t))
			if code == 0 || !strings.Contains(stderr, "another control plane") || !strings.Contains(stderr, "--force") {
				t.Errorf("another control plane: exit %d, %q", code, stderr)
			}
			code, _, stderr = command(t, "", "enroll", "--state-dir", dir, "--activation", other.code(t), "--force")
			if now, err := identity.Load(dir); code != 0 || err != nil || now.Pin == id.Pin || now.KeyFingerprint == id.KeyFingerprint {
				t.Errorf("--force: exit %d, %q, %v", code, stderr, err)
			}
		})
	}
}

func TestEnrollRefusedLeavesNothing(t *testing.T) {
	other := newControl(t, accept)
	for _, c := range []struct {
		name   string
		answer func(int) *wire.EnrollResponse
		code   func(*testing.T, *control) string
		want   string
	}{
		{"wrong secret", refuse(wire.CodeUnknownKey, "wrong activation code"), own, "wrong secret"},
		{"expired", refuse(wire.CodeExpired, "this activation expired"), own, "refused: the activation has expired"},
		{"used up", refuse(wire.CodeExhausted, "used by 10 of 10"), own, "used up"},
		{"deregistered", refuse(wire.CodePrecondition, "was deregistered"), own, "new key"},
		{"server with another key", accept, func(t *testing.T, c *control) string {
			return (&control{ca: other.ca, addr: c.addr}).code(t)
		}, "another key"},
		{"tampered", accept, func(t *testing.T, c *control) string {
			code := []byte(c.code(t))
			code[20] ^= 1
			return string(code)
		}, "damaged"},
		{"not a code", accept, func(*testing.T, *control) string { return "hello" }, "not an activation code"},
		{"no code", accept, func(*testing.T, *control) string { return "" }, "no activation code"},
		{"nobody there", accept, func(t *testing.T, c *control) string {
			return (&control{ca: c.ca, addr: "127.0.0.1:9"}).code(t)
		}, "connection refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("BELAY_ACTIVATION", "")
			cp := newControl(t, c.answer)
			parent := t.TempDir()
			code, stdout, stderr := command(t, "", "enroll", "--state-dir", filepath.Join(parent, "a", "state"), "--transport", "tcp", "--activation", c.code(t, cp))
			if code == 0 || stdout != "" || !strings.Contains(stderr, c.want) {
				t.Errorf("exit %d, %q, want an error that says %q", code, stderr, c.want)
			}
			if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func own(t *testing.T, c *control) string { return c.code(t) }

// A lost answer may have been a yes: the same key asks again.
func TestEnrollLostAnswer(t *testing.T) {
	c := newControl(t, func(n int) *wire.EnrollResponse {
		if n == 1 {
			return nil
		}
		return accept(n)
	})
	dir := t.TempDir()
	code, _, stderr := command(t, "", "enroll", "--state-dir", dir, "--transport", "tcp", "--activation", c.code(t), "--timeout", "500ms")
	if code == 0 || !strings.Contains(stderr, "run the same command again") {
		t.Fatalf("exit %d, %q", code, stderr)
	}
	if _, err := identity.Load(dir); !errors.Is(err, identity.ErrNotEnrolled) {
		t.Errorf("half enrolled: %v", err)
	}
	code, stdout, stderr := command(t, "", "enroll", "--state-dir", dir, "--transport", "tcp", "--activation", c.code(t))
	if code != 0 || !strings.Contains(stdout, "enrolled as") {
		t.Fatalf("exit %d, %q", code, stderr)
	}
	_, keys := c.seen()
	if len(keys) != 2 || keys[0] != keys[1] {
		t.Errorf("asked with keys %v", keys)
	}
}

func TestEnrollWaitsForABusyControlPlane(t *testing.T) {
	c := newControl(t, func(n int) *wire.EnrollResponse {
		if n == 1 {
			return &wire.EnrollResponse{Failure: &wire.Failure{Code: wire.CodeOverloaded, Message: "busy", RetryAfterMs: 10}}
		}
		return accept(n)
	})
	code, _, stderr := command(t, "", "enroll", "--state-dir", t.TempDir(), "--transport", "tcp", "--activation", c.code(t))
	if code != 0 || !strings.Contains(stderr, "trying again in 10ms") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestEnrollWhereNothingCanBeWritten(t *testing.T) {
	c := newControl(t, accept)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, fs.FileMode(0o600)); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := command(t, "", "enroll", "--state-dir", filepath.Join(file, "state"), "--activation", c.code(t))
	if code == 0 || !strings.Contains(stderr, "not a directory") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	if asked, _ := c.seen(); len(asked) > 0 {
		t.Error("asked although the answer could not be kept")
	}
}

// A full disk must be noticed before the control plane is asked: its answer
// could not be kept.
func TestEnrollOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	c := newControl(t, accept)
	state := filepath.Join(dir, "state")
	code, _, stderr := command(t, "", "enroll", "--state-dir", state, "--activation", c.code(t))
	if code == 0 || !strings.Contains(stderr, "no space left on device") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	if asked, _ := c.seen(); len(asked) > 0 {
		t.Error("asked although the answer could not be kept")
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}
