package link

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

// roll is who is watched just now.
type roll struct {
	mu sync.Mutex
	on []*watchedLoop
}

type watchedLoop struct {
	name string
	busy bool
}

func (r *roll) add(name string) (*watchedLoop, func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := &watchedLoop{name: name}
	r.on = append(r.on, l)
	return l, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.on = slices.DeleteFunc(r.on, func(o *watchedLoop) bool { return o == l })
	}
}

func (r *roll) watch(name string, _ time.Duration) (<-chan struct{}, func()) {
	_, done := r.add(name)
	return nil, done
}

func (r *roll) mind(name string, _ time.Duration) (func(bool), func()) {
	l, done := r.add(name)
	return func(at bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		l.busy = at
	}, done
}

// says is every loop on the roll, a star after those at work.
func (r *roll) says() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for _, l := range r.on {
		star := ""
		if l.busy {
			star = "*"
		}
		names = append(names, l.name+star)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// Everything that a session consists of is watched for as long as it is there,
// and at rest when there is nothing to do.
func TestASessionIsWatched(t *testing.T) {
	const waiting = "clock*, session assignments, session end, session reader, session reports, session requests, tunnel"
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			control := wiretest.NewControlPlane(t)
			cfg := config(t, control, transport)
			r := &roll{}
			cfg.Watch, cfg.Mind = r.watch, r.mind
			start(t, cfg, &downlink{})
			for range 2 {
				p := register(t, control)
				p.Send(endOfSet(7, true))
				said := ""
				until(t, "all of the session to wait", func() bool { said = r.says(); return said == waiting })
				if diff := cmp.Diff(waiting, said); diff != "" {
					t.Error(diff)
				}
				p.Close("", "")
				until(t, "the session to be gone", func() bool { return !strings.Contains(r.says(), "session") })
			}
		})
	}
}

// An agent that does not take what it was sent is seen by name.
func TestAgentThatDoesNotTakeASet(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	cfg := config(t, control, wire.TransportTCP)
	r := &roll{}
	cfg.Watch, cfg.Mind = r.watch, r.mind
	d := &downlink{}
	start(t, cfg, d)
	p := register(t, control)
	until(t, "the session to be up", func() bool { return d.read(func(d *downlink) bool { return len(d.ups) == 1 }) })
	d.mu.Lock() // Assign hangs
	defer d.mu.Unlock()
	for n := range 8 { // more than the reader can put by
		p.Send(endOfSet(uint64(7+n), true))
	}
	until(t, "the reader to be held up", func() bool { return strings.Contains(r.says(), "session reader*") })
}
