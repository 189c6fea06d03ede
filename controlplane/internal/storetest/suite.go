package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane"
)

// Run holds the store that open gives, empty and closed by the test's end, to
// the contract of controlplane.Store.
func Run(t *testing.T, open func(t *testing.T) controlplane.Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, controlplane.Store)
	}{
		{"a missing key has no revision", missing},
		{"what is put is read back", putGet},
		{"an empty value is a value", emptyValue},
		{"a transaction applies all or nothing", allOrNothing},
		{"a transaction too large is refused", tooLarge},
		{"of many that compare the same revision one wins", race},
		{"a list is in byte order, bounded, and goes on after a key", list},
		{"a watch sees whole revisions in order from where it starts", watch},
		{"a watch sees only its prefix", watchPrefix},
		{"a watch ends with its function's error", watchError},
		{"a watch ends quietly with its context", watchCancel},
		{"an ended context is an error", cancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func put(t *testing.T, s controlplane.Store, ops ...controlplane.Op) int64 {
	t.Helper()
	rev, ok, err := s.Txn(within(t), nil, ops)
	if err != nil || !ok {
		t.Fatalf("Txn(%v) = %v, %v", ops, ok, err)
	}
	return rev
}

func missing(t *testing.T, s controlplane.Store) {
	kv, err := s.Get(within(t), "/a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(controlplane.KV{Key: "/a"}, kv); diff != "" {
		t.Error(diff)
	}
}

func putGet(t *testing.T, s controlplane.Store) {
	rev := put(t, s, controlplane.Put("/a", []byte("1")))
	kv, err := s.Get(within(t), "/a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(controlplane.KV{Key: "/a", Value: []byte("1"), ModRevision: rev}, kv); diff != "" {
		t.Error(diff)
	}
	now, err := s.Revision(within(t))
	if err != nil || now != rev {
		t.Errorf("Revision() = %d, %v; want %d", now, err, rev)
	}
	put(t, s, controlplane.Delete("/a"))
	if kv, err := s.Get(within(t), "/a"); err != nil || kv.ModRevision != 0 || kv.Value != nil {
		t.Errorf("after delete: %+v, %v", kv, err)
	}
}

func emptyValue(t *testing.T, s controlplane.Store) {
	put(t, s, controlplane.Put("/a", nil))
	kv, err := s.Get(within(t), "/a")
	if err != nil || kv.ModRevision == 0 || kv.Value == nil {
		t.Errorf("Get = %+v, %v; want a value of no bytes", kv, err)
	}
}

func allOrNothing(t *testing.T, s controlplane.Store) {
	ctx := within(t)
	rev := put(t, s, controlplane.Put("/a", []byte("1")))
	for _, c := range []struct {
		name     string
		compares []controlplane.Compare
		want     bool
	}{
		{"one of two fails", []controlplane.Compare{{Key: "/a", ModRevision: rev}, {Key: "/b", ModRevision: 7}}, false},
		{"exists but should not", []controlplane.Compare{{Key: "/a"}}, false},
		{"both hold", []controlplane.Compare{{Key: "/a", ModRevision: rev}, {Key: "/b"}}, true},
	} {
		_, ok, err := s.Txn(ctx, c.compares, []controlplane.Op{controlplane.Put("/b", nil), controlplane.Put("/c", nil), controlplane.Delete("/a")})
		if err != nil || ok != c.want {
			t.Fatalf("%s: ok = %v, %v; want %v", c.name, ok, err, c.want)
		}
		kvs, _, err := s.List(ctx, "/", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]int{false: 1, true: 2}[c.want]; len(kvs) != want {
			t.Errorf("%s: %d keys afterwards, want %d", c.name, len(kvs), want)
		}
	}
}

func tooLarge(t *testing.T, s controlplane.Store) {
	ops := make([]controlplane.Op, controlplane.MaxTxnOps+1)
	for i := range ops {
		ops[i] = controlplane.Put(fmt.Sprintf("/k/%03d", i), []byte("v"))
	}
	if _, ok, err := s.Txn(within(t), nil, ops); err == nil || ok {
		t.Errorf("%d ops: ok = %v, %v; want an error", len(ops), ok, err)
	}
	put(t, s, ops[:controlplane.MaxTxnOps]...)
}

func race(t *testing.T, s controlplane.Store) {
	ctx := within(t)
	rev := put(t, s, controlplane.Put("/a", []byte("0")))
	var mu sync.Mutex
	var wg sync.WaitGroup
	won := 0
	for i := range 20 {
		wg.Go(func() {
			_, ok, err := s.Txn(ctx, []controlplane.Compare{{Key: "/a", ModRevision: rev}}, []controlplane.Op{controlplane.Put("/a", fmt.Append(nil, i))})
			if err != nil {
				t.Error(err)
			}
			if ok {
				mu.Lock()
				defer mu.Unlock()
				won++
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d transactions won, want 1", won)
	}
}

func list(t *testing.T, s controlplane.Store) {
	ctx := within(t)
	var ops []controlplane.Op
	for _, k := range []string{"/p/b", "/p/a", "/p/c", "/p0", "/q/a", "/p"} {
		ops = append(ops, controlplane.Put(k, []byte(k)))
	}
	rev := put(t, s, ops...)
	for _, c := range []struct {
		prefix, after string
		limit         int
		want          []string
	}{
		{"/p/", "", 0, []string{"/p/a", "/p/b", "/p/c"}},
		{"/p/", "", 2, []string{"/p/a", "/p/b"}},
		{"/p/", "/p/b", 0, []string{"/p/c"}},
		{"/p/", "/p/bb", 1, []string{"/p/c"}},
		{"/p/", "/p/c", 0, nil},
		{"/p/", "/a", 1, []string{"/p/a"}},
		{"/none/", "", 0, nil},
		{"/p", "", 0, []string{"/p", "/p/a", "/p/b", "/p/c", "/p0"}},
		{"", "", 0, []string{"/p", "/p/a", "/p/b", "/p/c", "/p0", "/q/a"}},
	} {
		kvs, at, err := s.List(ctx, c.prefix, c.after, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, kv := range kvs {
			got = append(got, kv.Key)
			if kv.ModRevision != rev || string(kv.Value) != kv.Key {
				t.Errorf("%+v: want revision %d and its key as value", kv, rev)
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("List(%q, %q, %d): %s", c.prefix, c.after, c.limit, diff)
		}
		if at != rev {
			t.Errorf("List(%q): revision %d, want %d", c.prefix, at, rev)
		}
	}
}

var errEnough = errors.New("enough")

// collect watches until n changes were seen.
func collect(t *testing.T, s controlplane.Store, prefix string, from int64, n int) []controlplane.Change {
	t.Helper()
	var got []controlplane.Change
	err := s.Watch(within(t), prefix, from, func(c controlplane.Change) error {
		got = append(got, c)
		if len(got) == n {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		t.Fatalf("Watch saw %d of %d changes and ended with %v", len(got), n, err)
	}
	return got
}

func watch(t *testing.T, s controlplane.Store) {
	r1 := put(t, s, controlplane.Put("/w/a", []byte("1")))
	r2 := put(t, s, controlplane.Put("/w/b", []byte("2")), controlplane.Put("/w/c", []byte{}))
	done := make(chan []controlplane.Change, 1)
	go func() { done <- collect(t, s, "/w/", r1, 3) }()
	r3 := put(t, s, controlplane.Delete("/w/b"))
	r4 := put(t, s, controlplane.Put("/w/a", []byte("4")))
	want := []controlplane.Change{
		{Revision: r2, KVs: []controlplane.KV{{Key: "/w/b", Value: []byte("2"), ModRevision: r2}, {Key: "/w/c", Value: []byte{}, ModRevision: r2}}},
		{Revision: r3, KVs: []controlplane.KV{{Key: "/w/b", ModRevision: r3}}},
		{Revision: r4, KVs: []controlplane.KV{{Key: "/w/a", Value: []byte("4"), ModRevision: r4}}},
	}
	if diff := cmp.Diff(want, <-done); diff != "" {
		t.Error(diff)
	}
}

func watchPrefix(t *testing.T, s controlplane.Store) {
	from := put(t, s, controlplane.Put("/x/a", nil))
	put(t, s, controlplane.Put("/y/a", nil))
	rev := put(t, s, controlplane.Put("/x/b", nil), controlplane.Put("/y/b", nil))
	got := collect(t, s, "/x/", from, 1)
	if diff := cmp.Diff([]controlplane.Change{{Revision: rev, KVs: []controlplane.KV{{Key: "/x/b", Value: []byte{}, ModRevision: rev}}}}, got); diff != "" {
		t.Error(diff)
	}
}

func watchError(t *testing.T, s controlplane.Store) {
	from, err := s.Revision(within(t))
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, controlplane.Put("/a", nil))
	collect(t, s, "/", from, 1)
}

func watchCancel(t *testing.T, s controlplane.Store) {
	ctx, cancel := context.WithCancel(within(t))
	put(t, s, controlplane.Put("/a", nil))
	done := make(chan error, 1)
	go func() {
		done <- s.Watch(ctx, "/", 0, func(controlplane.Change) error { cancel(); return nil })
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Watch = %v, want nil", err)
		}
	case <-within(t).Done():
		t.Error("Watch did not end with its context")
	}
}

func cancelled(t *testing.T, s controlplane.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Get(ctx, "/a"); err == nil {
		t.Error("Get with an ended context: no error")
	}
	if _, _, err := s.List(ctx, "/a", "", 0); err == nil {
		t.Error("List with an ended context: no error")
	}
	if _, _, err := s.Txn(ctx, nil, []controlplane.Op{controlplane.Put("/a", nil)}); err == nil {
		t.Error("Txn with an ended context: no error")
	}
}
