package containerd

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/belay-edge/belay/images"
	"github.com/belay-edge/belay/plugins/sdk"
)

// tini is Debian's static init, which packaging/dev/setup.sh installs.
const tini = "/usr/bin/tini-static"

// orphan leaves an exited child to the container's first process, whose
// program then is one that asks after no child.
const orphan = `/bin/sh -c 'sleep 0.1 & echo orphan $!'; exec sleep 600`

// TestInitReaps: what loses its parent is reaped with an init, and stays a
// zombie without, which is why one would ask for it.
func TestInitReaps(t *testing.T) {
	w := newWorldWithInit(t)
	for _, r := range []struct {
		name  string
		init  bool
		first string
	}{
		{"with", true, "init"},
		{"without", false, "sleep"},
	} {
		t.Run(r.name, func(t *testing.T) {
			w.t = t
			q := w.request(w.attempt(sdk.TaskSpec{}), sdk.NetworkNone, images.Shell, "/bin/sh", "-c", orphan)
			q.Spec.Init = r.init
			w.start(q)
			w.eventually("the orphan is named", func() bool { return strings.HasSuffix(read(t, q.Stdout), "\n") })
			pid, ok := strings.CutPrefix(strings.TrimSpace(read(t, q.Stdout)), "orphan ")
			if !ok {
				t.Fatalf("it says %q", read(t, q.Stdout))
			}
			inside := func(script string) string {
				res, err := w.rt.Exec(w.ctx(), sdk.ExecRequest{Attempt: q.Attempt, Command: []string{"/bin/sh", "-c", script}})
				if err != nil {
					t.Fatal(err)
				}
				return strings.TrimSpace(string(res.Output))
			}
			w.eventually("the first process is "+r.first, func() bool { return inside("cat /proc/1/comm") == r.first })
			state := func() string {
				return inside(`[ ! -e /proc/` + pid + ` ] && echo reaped || grep State /proc/` + pid + `/status`)
			}
			want := map[bool]string{true: "reaped", false: "Z (zombie)"}[r.init]
			w.eventually("the orphan is "+want, func() bool { return strings.Contains(state(), want) })
		})
	}
}

// TestInitForwards: signals go to the program and its exit code comes back.
func TestInitForwards(t *testing.T) {
	w := newWorldWithInit(t)
	for _, r := range []struct {
		name, script string
		grace        time.Duration
		code         int
		output       string
	}{
		{"handled", `trap 'echo told; exit 7' TERM; echo up; while :; do sleep 0.05; done`, slow(20 * time.Second), 7, "up\ntold\n"},
		{"not handled", `echo up; exec sleep 600`, slow(20 * time.Second), 143, "up\n"},
		{"ignored", `trap '' TERM; echo up; while :; do sleep 0.05; done`, 300 * time.Millisecond, 137, "up\n"},
	} {
		t.Run(r.name, func(t *testing.T) {
			w.t = t
			q := w.request(w.attempt(sdk.TaskSpec{}), sdk.NetworkNone, images.Shell, "/bin/sh", "-c", r.script)
			q.Spec.Init = true
			w.start(q)
			w.eventually("the program is up", func() bool { return read(t, q.Stdout) == "up\n" })
			c, err := w.rt.Stop(w.ctx(), q.Attempt, r.grace)
			if err != nil {
				t.Fatal(err)
			}
			wantExit(t, c, r.code)
			if got := read(t, q.Stdout); got != r.output {
				t.Errorf("it says %q, want %q", got, r.output)
			}
		})
	}
	t.Run("exit", func(t *testing.T) {
		w.t = t
		q := w.request(w.attempt(sdk.TaskSpec{}), sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "exit 9")
		q.Spec.Init = true
		w.start(q)
		wantExit(t, w.exit(q.Attempt), 9)
	})
}

func TestInitNotThere(t *testing.T) {
	w := newWorldWith(t, `,"init_path":"/nothing/init"`)
	q := w.request(w.attempt(sdk.TaskSpec{}), sdk.NetworkNone, images.Shell, "/bin/sh", "-c", "exit 0")
	q.Spec.Init = true
	_, err := w.rt.Start(w.ctx(), q)
	wantError(t, err, sdk.Unsupported, "init_path")
}

// newWorldWithInit leaves it to the plugin to find one.
func newWorldWithInit(t *testing.T) *world {
	if _, err := os.Stat(tini); err != nil {
		t.Skipf("no init: %v (apt-get install tini)", err)
	}
	return newWorld(t)
}
