package controlplane_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/scheduler"
	"github.com/belay-edge/belay/controlplane/internal/storetest"
	"github.com/belay-edge/belay/controlplane/wire"
)

// clock is the server's clock, moved by the test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }
func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// tunnels says who is connected, and notes who was cut off.
type tunnels struct {
	mu           sync.Mutex
	away         map[string]bool
	disconnected []string
}

func (t *tunnels) Session(id string) (controlplane.Session, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return controlplane.Session{Transport: "quic"}, !t.away[id]
}
func (t *tunnels) LastSeen(string) time.Time { return time.Time{} }
func (t *tunnels) Disconnect(id, code, message string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.disconnected = append(t.disconnected, id)
}
func (t *tunnels) Rebind(string) {}
func (t *tunnels) Logs(context.Context, string, *wire.LogsRequest, func(*wire.Chunk) error) error {
	return nil
}

type fixture struct {
	*controlplane.Plane
	store   *storetest.Memory
	clock   *clock
	tunnels *tunnels
}

func open(t *testing.T, store *storetest.Memory) *fixture {
	t.Helper()
	f, end := start(t, t.Output(), rand.Reader, store)
	t.Cleanup(end)
	return f
}

// start is open for those who end it themselves.
func start(t failer, log io.Writer, random io.Reader, store *storetest.Memory) (f *fixture, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f = &fixture{store: store, clock: &clock{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}, tunnels: &tunnels{away: map[string]bool{}}}
	p, err := controlplane.Open(ctx, controlplane.Config{
		Store: store, Now: f.clock.Now, Rand: random, Place: scheduler.Place,
		Logger: slog.New(slog.NewTextHandler(log, nil)), Pepper: []byte("pepper"),
		Addresses: []string{"127.0.0.1:7443"}, Pin: wire.Pin{1, 2, 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.SetTunnels(f.tunnels)
	f.Plane = p
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return f, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

// failer is a *testing.T or a *rapid.T.
type failer interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
	Errorf(string, ...any)
}

func newPlane(t *testing.T) *fixture { return open(t, storetest.NewMemory()) }

func (f *fixture) activation(t *testing.T, n controlplane.NewActivation) wire.ActivationCode {
	t.Helper()
	_, text, _, err := f.CreateActivation(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	code, err := wire.ParseActivationCode(text)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

func fingerprint(n int) string {
	sum := sha256.Sum256(fmt.Append(nil, n))
	return hex.EncodeToString(sum[:])
}

func enrollment(c wire.ActivationCode, n int) controlplane.Enrollment {
	return controlplane.Enrollment{ActivationID: c.ID, Secret: c.Secret, KeyFingerprint: fingerprint(n), Facts: facts()}
}

func facts() controlplane.Facts {
	return controlplane.Facts{
		Attributes: map[string]string{"belay.arch": "amd64"}, CPU: 4096, MemoryMiB: 4000,
		Plugins: []controlplane.PluginInfo{
			{Name: "containerd", Version: "1", Kinds: []string{"runtime"}, State: "ready", Networks: []string{"bridge", "host", "none"}},
			{Name: "process", Version: "1", Kinds: []string{"runtime"}, State: "ready", Networks: []string{"host"}},
		},
	}
}

// device enrols one device.
func (f *fixture) device(t *testing.T, n int) controlplane.Instance {
	t.Helper()
	i, _, err := f.Enroll(t.Context(), enrollment(f.activation(t, controlplane.NewActivation{}), n))
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func (f *fixture) register(t *testing.T, document string) string {
	t.Helper()
	d, _, err := f.RegisterTaskDefinition(t.Context(), "", []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s:%d", d.Family, d.Revision)
}

const web = `{"family":"web","containerDefinitions":[{"name":"web","image":"example.org/web:1","memory":1000,"cpu":256,"portMappings":[{"containerPort":80,"hostPort":8080}]}]}`
const sleep = `{"family":"sleep","belay":{"runtime":"process"},"containerDefinitions":[{"name":"s","command":["/bin/sleep","600"],"essential":true}]}`

func (f *fixture) run(t *testing.T, n controlplane.NewTasks) []controlplane.Task {
	t.Helper()
	ts, failures, _, err := f.RunTask(t.Context(), n)
	if err != nil || len(failures) > 0 {
		t.Fatal(failures, err)
	}
	return ts
}

func wantCode(t *testing.T, err error, code controlplane.Code, words ...string) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Fatalf("error %v: want code %q", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

func TestEnrollLimitIsExactUnderRace(t *testing.T) {
	// Two planes on one store, as two replicas would be: their races meet only
	// in the compares.
	store := storetest.NewMemory()
	planes := []*fixture{open(t, store), open(t, store)}
	code := planes[0].activation(t, controlplane.NewActivation{Limit: 10})
	var mu sync.Mutex
	var wg sync.WaitGroup
	enrolled, refused := map[string]bool{}, 0
	for n := range 50 {
		wg.Go(func() {
			i, _, err := planes[n%2].Enroll(t.Context(), enrollment(code, n))
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				enrolled[i.ID] = true
			case errors.Is(err, controlplane.Exhausted):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(enrolled) != 10 || refused != 40 {
		t.Errorf("%d enrolled, %d refused; want 10 and 40", len(enrolled), refused)
	}
	vs, _, _, err := planes[0].ListInstances(t.Context(), controlplane.Freshness{Consistent: true}, "", controlplane.Page{})
	if err != nil || len(vs) != 10 {
		t.Errorf("%d instances, %v; want 10", len(vs), err)
	}
}

func TestEnrollRefusals(t *testing.T) {
	f := newPlane(t)
	code := f.activation(t, controlplane.NewActivation{Cluster: "shop", Attributes: map[string]string{"site": "north"}})
	wrong := code
	wrong.Secret = make([]byte, 32)
	_, _, err := f.Enroll(t.Context(), enrollment(wrong, 1))
	wantCode(t, err, controlplane.Unauthenticated, "code")

	i, already, err := f.Enroll(t.Context(), enrollment(code, 1))
	if err != nil || already || i.Cluster != "shop" || i.Attributes["site"] != "north" {
		t.Fatal(i, already, err)
	}
	_, _, err = f.Enroll(t.Context(), enrollment(code, 2))
	wantCode(t, err, controlplane.Exhausted, "used up")

	again, already, err := f.Enroll(t.Context(), enrollment(code, 1))
	if err != nil || !already || again.ID != i.ID {
		t.Errorf("same key again: %v, already %v, %v; want instance %s", again.ID, already, err, i.ID)
	}

	code = f.activation(t, controlplane.NewActivation{Life: time.Hour})
	f.clock.add(time.Hour)
	_, _, err = f.Enroll(t.Context(), enrollment(code, 3))
	wantCode(t, err, controlplane.Expired, "expired")

	code = f.activation(t, controlplane.NewActivation{})
	if _, err := f.DeleteActivation(t.Context(), "", code.ID[:8]); err != nil {
		t.Fatal(err)
	}
	_, _, err = f.Enroll(t.Context(), enrollment(code, 3))
	wantCode(t, err, controlplane.NotFound, "deleted")

	if _, _, err := f.DeregisterInstance(t.Context(), "", i.ID, false); err != nil {
		t.Fatal(err)
	}
	_, err = f.Authenticate(t.Context(), i.ID, i.KeyFingerprint)
	wantCode(t, err, controlplane.Denied, "deregistered")
	_, _, err = f.Enroll(t.Context(), enrollment(f.activation(t, controlplane.NewActivation{}), 1))
	wantCode(t, err, controlplane.Precondition, "deregistered")
	if len(f.tunnels.disconnected) != 1 {
		t.Errorf("disconnected %v, want the deregistered instance", f.tunnels.disconnected)
	}
}

func TestActivationCodeIsNotStored(t *testing.T) {
	f := newPlane(t)
	code := f.activation(t, controlplane.NewActivation{Token: "t1"})
	kvs, _, err := f.store.List(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		if strings.Contains(string(kv.Value), string(code.Secret)) || strings.Contains(string(kv.Value), hex.EncodeToString(code.Secret)) {
			t.Errorf("%s holds the secret", kv.Key)
		}
	}
}

func TestClientTokens(t *testing.T) {
	f := newPlane(t)
	f.device(t, 1)
	ctx := t.Context()

	a1, c1, _, err := f.CreateActivation(ctx, controlplane.NewActivation{Token: "a"})
	if err != nil {
		t.Fatal(err)
	}
	a2, c2, _, err := f.CreateActivation(ctx, controlplane.NewActivation{Token: "a"})
	if err != nil || a1.ID != a2.ID || c1 != c2 {
		t.Errorf("repeated create: %s and %s, same code %v, %v", a1.ID, a2.ID, c1 == c2, err)
	}
	_, _, _, err = f.CreateActivation(ctx, controlplane.NewActivation{Token: "a", Limit: 2})
	wantCode(t, err, controlplane.InvalidArgument, "client token")

	d1, _, err := f.RegisterTaskDefinition(ctx, "b", []byte(sleep))
	if err != nil {
		t.Fatal(err)
	}
	if d2, _, err := f.RegisterTaskDefinition(ctx, "b", []byte(sleep)); err != nil || d2.Revision != d1.Revision {
		t.Errorf("repeated register: revision %d, %v; want %d", d2.Revision, err, d1.Revision)
	}

	t1 := f.run(t, controlplane.NewTasks{Token: "c", TaskDefinition: "sleep", Count: 3})
	// The second revision must not change what the repetition answers.
	f.register(t, sleep)
	t2 := f.run(t, controlplane.NewTasks{Token: "c", TaskDefinition: "sleep", Count: 3})
	for i := range t1 {
		if t1[i].ID != t2[i].ID {
			t.Errorf("repeated run: task %s, want %s", t2[i].ID, t1[i].ID)
		}
	}
	all, _, _, err := f.ListTasks(ctx, controlplane.Freshness{}, controlplane.TaskFilter{}, controlplane.Page{})
	if err != nil || len(all) != 3 {
		t.Errorf("%d tasks, %v; want 3", len(all), err)
	}

	// A racing repetition is one call, too.
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		wg.Go(func() {
			ts, _, _, err := f.RunTask(ctx, controlplane.NewTasks{Token: "d", TaskDefinition: "sleep"})
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = ts[0].ID
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("racing repetitions made %s and %s", id, ids[0])
		}
	}

	// A create whose answer was lost.
	lost := true
	f.store.FailWith(func(op string) error {
		if op == "txn-answer" && lost {
			lost = false
			return errors.New("the answer was lost")
		}
		return nil
	})
	if _, _, _, err := f.RunTask(ctx, controlplane.NewTasks{Token: "e", TaskDefinition: "sleep"}); err == nil {
		t.Fatal("no error although the answer was lost")
	}
	f.run(t, controlplane.NewTasks{Token: "e", TaskDefinition: "sleep"})
	if all, _, _, err = f.ListTasks(ctx, controlplane.Freshness{}, controlplane.TaskFilter{}, controlplane.Page{}); err != nil || len(all) != 5 {
		t.Errorf("%d tasks, %v; want 5", len(all), err)
	}
}

func TestRestartLosesNothing(t *testing.T) {
	store := storetest.NewMemory()
	f := open(t, store)
	i := f.device(t, 1)
	f.register(t, web)
	task := f.run(t, controlplane.NewTasks{TaskDefinition: "web"})[0]
	g := open(t, store)
	if g.Incarnation() != f.Incarnation() || g.Incarnation() == "" {
		t.Errorf("incarnation %q, want %q", g.Incarnation(), f.Incarnation())
	}
	set, err := g.Assignments(t.Context(), i.ID, "", 0)
	if err != nil || !set.Full || len(set.Set) != 1 || set.Set[0].TaskId != task.ID || set.Set[0].Spec.GetContainers()[0].Image != "example.org/web:1" {
		t.Errorf("assignments after a restart: %v, %v", set, err)
	}
}
