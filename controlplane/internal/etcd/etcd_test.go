package etcd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/storetest"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// empty clears a store between cases: starting etcd takes most of a second.
func empty(t *testing.T, s *Store) {
	t.Helper()
	if _, err := s.client.Delete(t.Context(), "\x00", clientv3.WithFromKey()); err != nil {
		t.Fatal(err)
	}
}

func TestEmbedded(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	storetest.Run(t, func(t *testing.T) controlplane.Store { empty(t, s); return s })
}

func TestExternal(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	endpoint := "http://" + addr
	cfg := embed.NewConfig()
	cfg.Dir, cfg.ListenPeerUrls, cfg.LogLevel = t.TempDir(), nil, "error"
	urls, err := parseURLs(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = urls, urls
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	<-server.Server.ReadyNotify()
	s, err := Connect(t.Context(), []string{endpoint}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	storetest.Run(t, func(t *testing.T) controlplane.Store { empty(t, s); return s })
}

func TestConnectRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := Connect(ctx, []string{"http://127.0.0.1:1"}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("Connect = %v, want an error naming the endpoint", err)
	}
}

func TestRestartLosesNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	rev, ok, err := s.Txn(t.Context(), nil, []controlplane.Op{controlplane.Put("/a", []byte("1")), controlplane.Put("/b", []byte("2"))})
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	defer s.Close()
	kvs, at, err := s.List(t.Context(), "/", "", 0)
	if err != nil || len(kvs) != 2 || kvs[1].ModRevision != rev || at < rev {
		t.Errorf("after a restart: %+v at %d, %v; want 2 keys of revision %d", kvs, at, err, rev)
	}
}

func TestWatchCompacted(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	var rev int64
	for range 3 {
		rev, _, _ = s.Txn(t.Context(), nil, []controlplane.Op{controlplane.Put("/a", nil)})
	}
	if _, err := s.client.Compact(t.Context(), rev, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	err := s.Watch(t.Context(), "/", 1, func(controlplane.Change) error { return nil })
	if !errors.Is(err, controlplane.ErrCompacted) {
		t.Errorf("Watch = %v, want ErrCompacted", err)
	}
}

// A store that had been full took no write ever again: lifting etcd's alarm
// takes a client, which an embedded store has no port for.
func TestFullStoreRecoversAtTheNextStart(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	open := func() *Store {
		s, err := openWithin(t.Context(), dir, 1<<20, 0, log)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	fill := []controlplane.Op{controlplane.Put("/a", make([]byte, 200<<10))}
	var err error
	for n := 0; err == nil && n < 50; n++ {
		_, _, err = s.Txn(t.Context(), nil, fill)
	}
	if !errors.Is(err, controlplane.Unavailable) || !strings.Contains(err.Error(), "size limit") {
		t.Fatalf("filling the store: %v", err)
	}
	// What makes room is still taken.
	if _, _, err := s.Txn(t.Context(), nil, []controlplane.Op{controlplane.Delete("/a")}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()
	if _, _, err := s.Txn(t.Context(), nil, fill); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

func TestListPages(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	const n = 2*listPage + 3
	for i := 0; i < n; {
		var ops []controlplane.Op
		for ; i < n && len(ops) < controlplane.MaxTxnOps; i++ {
			ops = append(ops, controlplane.Put("/k/"+string(rune('a'+i/100))+"/"+string(rune('a'+i%100)), nil))
		}
		if _, _, err := s.Txn(t.Context(), nil, ops); err != nil {
			t.Fatal(err)
		}
	}
	kvs, _, err := s.List(t.Context(), "/k/", "", 0)
	if err != nil || len(kvs) != n {
		t.Errorf("List = %d keys, %v; want %d", len(kvs), err, n)
	}
}

// An embedded store must not be reachable by others on the machine.
func TestListensOnNothing(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "etcd"))
	defer s.Close()
	if n := len(s.server.Clients) + len(s.server.Peers); n != 0 {
		t.Errorf("%d listeners, want none", n)
	}
	if fi, err := os.Stat(s.server.Config().Dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("data directory: %v, %v; want mode 0700", fi.Mode(), err)
	}
}
