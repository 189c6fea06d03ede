package controlplane_test

import (
	"context"
	"crypto/rand"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/scheduler"
	"github.com/belay-edge/belay/controlplane/internal/storetest"
)

// overtaken is a store in which something happens right after the first look
// for a client token.
type overtaken struct {
	*storetest.Memory
	meanwhile func()
	once      sync.Once
}

func (o *overtaken) Get(ctx context.Context, key string) (controlplane.KV, error) {
	kv, err := o.Memory.Get(ctx, key)
	if strings.Contains(key, "/tokens/") && o.meanwhile != nil {
		o.once.Do(o.meanwhile)
	}
	return kv, err
}

// A client that repeats a call whose first try is still under way was told
// that there is no room, which the first try had taken, or no such object,
// which it had deleted.
func TestRepetitionThatIsOvertakenHasTheFirstAnswer(t *testing.T) {
	f := newPlane(t)
	f.device(t, 1)
	f.register(t, web) // for a fixed port: one on the device
	store := &overtaken{Memory: f.store}
	p, err := controlplane.Open(t.Context(), controlplane.Config{
		Store: store, Now: f.clock.Now, Rand: rand.Reader, Place: scheduler.Place,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Pepper: []byte("pepper"),
	})
	if err != nil {
		t.Fatal(err)
	}
	p.SetTunnels(f.tunnels)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() { cancel(); <-done }()

	var first []controlplane.Task
	store.meanwhile = func() {
		first = f.run(t, controlplane.NewTasks{TaskDefinition: "web", Token: "a"})
		// The other has heard of it.
		if _, _, err := p.DescribeTask(t.Context(), controlplane.Freshness{Consistent: true}, first[0].ID); err != nil {
			t.Error(err)
		}
	}
	ts, failures, _, err := p.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: "web", Token: "a"})
	if err != nil || len(failures) > 0 || len(ts) != 1 || ts[0].ID != first[0].ID {
		t.Errorf("the repetition has tasks %v, failures %v, %v; want task %s", ts, failures, err, first[0].ID)
	}
}
