package blackbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/hw-tests/rig"
)

func exitCode(err error) int {
	var e *rig.ExitError
	var x *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.Code
	case errors.As(err, &x):
		return x.ExitCode()
	}
	return -1
}

func kill(t *testing.T, pid int) {
	if pid > 1 {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
	}
}

// enroll runs belay-agent enroll on a state directory and returns its words.
func enroll(t *testing.T, state, code string, extra ...string) (string, int) {
	t.Helper()
	args := append([]string{"enroll", "--state-dir", state, "--activation", code}, extra...)
	out, err := exec.CommandContext(deadline(t, patience), bin(t).Path("belay-agent"), args...).CombinedOutput()
	return string(out), exitCode(err)
}

// enrolled says whether a state directory holds an identity.
func enrolled(state string) bool {
	_, err := os.Stat(filepath.Join(state, "identity", "instance.json"))
	return err == nil
}

func TestActivationLimitUnderRace(t *testing.T) {
	c := newControl(t)
	code, err := c.CLI().Activate(deadline(t, patience), cluster, 10)
	if err != nil {
		t.Fatal(err)
	}
	const devices = 50
	dir := tempDir(t)
	var mu sync.Mutex
	ok, words := 0, map[string]int{}
	var wg sync.WaitGroup
	for i := range devices {
		wg.Go(func() {
			state := filepath.Join(dir, fmt.Sprint(i))
			out, rc := enroll(t, state, code)
			mu.Lock()
			defer mu.Unlock()
			if rc == 0 {
				ok++
			} else {
				words[strings.TrimSpace(out)]++
			}
			if enrolled(state) != (rc == 0) {
				t.Errorf("device %d: exit %d, enrolled %v", i, rc, enrolled(state))
			}
		})
	}
	wg.Wait()
	if ok != 10 {
		t.Errorf("%d of %d devices enrolled with a limit of 10; refusals: %v", ok, devices, words)
	}
	var l struct{ Instances []struct{ ID string } }
	if err := c.CLI().JSON(deadline(t, patience), &l, "instance", "list", "--cluster", cluster); err != nil || len(l.Instances) != 10 {
		t.Errorf("the control plane lists %d instances, %v", len(l.Instances), err)
	}
	for w := range words {
		if !strings.Contains(w, "used up") && !strings.Contains(w, "limit") {
			t.Errorf("a refusal does not say why: %s", w)
		}
	}
}

func TestActivationRefusals(t *testing.T) {
	c, other := newControl(t), newControl(t)
	ctx := deadline(t, patience)
	code, err := c.CLI().Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.CLI().Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	var deleted struct {
		Code       string
		Activation struct{ ID string }
	}
	if err := c.CLI().JSON(ctx, &deleted, "activation", "create", "--cluster", cluster); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CLI().Run(ctx, "activation", "delete", deleted.Activation.ID); err != nil {
		t.Fatal(err)
	}
	var expired struct{ Code string }
	if err := c.CLI().JSON(ctx, &expired, "activation", "create", "--cluster", cluster, "--expires", "1s"); err != nil {
		t.Fatal(err)
	}
	used, err := c.CLI().Activate(ctx, cluster, 1)
	if err != nil {
		t.Fatal(err)
	}
	dir := tempDir(t)
	if out, rc := enroll(t, filepath.Join(dir, "first"), used); rc != 0 {
		t.Fatal(out)
	}
	moment(1100_000_000) // the activation's second passes
	flipped := []byte(code)
	flipped[len(flipped)/2] ^= 1
	for _, r := range []struct{ name, code, want string }{
		{"no code at all", "hello", "activation code"},
		{"damaged", string(flipped), "damaged"},
		{"cut short", code[:len(code)-3], "damaged"},
		{"deleted", deleted.Code, "activation"},
		{"expired", expired.Code, "expired"},
		{"used up", used, "used up"},
		{"another control plane's key", swapAddress(t, code, foreign), "key"},
	} {
		t.Run(r.name, func(t *testing.T) {
			state := filepath.Join(dir, strings.ReplaceAll(r.name, " ", "-"))
			out, rc := enroll(t, state, r.code)
			t.Logf("exit %d: %s", rc, strings.TrimSpace(out))
			if rc == 0 || !strings.Contains(out, r.want) {
				t.Errorf("exit %d and no word of %q", rc, r.want)
			}
			if enrolled(state) {
				t.Error("a half-enrolled device was left behind")
			}
			if b, _ := filepath.Glob(filepath.Join(state, "identity", "*")); len(b) > 0 {
				t.Errorf("left behind: %v", b)
			}
		})
	}
	// After a refusal the same directory enrols with a good code.
	state := filepath.Join(dir, "used-up")
	if out, rc := enroll(t, state, code); rc != 0 {
		t.Errorf("a good code after a refused one: %s", out)
	}
	// Enrolling again is harmless and says so.
	if out, rc := enroll(t, state, code); rc != 0 || !strings.Contains(out, "already") {
		t.Errorf("enrolling twice: exit %d, %s", rc, out)
	}
}

// swapAddress makes a code that leads to the other control plane while pinning
// the first one's key: what a hijacked address would look like.
func swapAddress(t *testing.T, code, other string) string {
	t.Helper()
	a, err := wire.ParseActivationCode(code)
	if err != nil {
		t.Fatal(err)
	}
	b, err := wire.ParseActivationCode(other)
	if err != nil {
		t.Fatal(err)
	}
	a.Addresses = b.Addresses
	s, err := a.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return s
}
