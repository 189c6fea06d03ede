// Package etcd is the control plane's Store on etcd: embedded in the process,
// or an external cluster, with the same code above the client.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"

	"github.com/belay-edge/belay/controlplane"
)

const (
	// quotaBytes is how large the database may grow before writes are
	// refused. etcd's own default of 2 GiB is a few million small objects;
	// its authors advise against more than 8 GiB.
	quotaBytes = 4 << 30
	// maxRequestBytes bounds one transaction: MaxTxnOps task specifications
	// of some size. etcd's default is 1.5 MiB.
	maxRequestBytes = 8 << 20
	// retention is how much history a watcher that fell behind may ask for.
	retention = "10m"

	startTimeout = 60 * time.Second
	dialTimeout  = 5 * time.Second
)

// Store is a controlplane.Store on etcd.
type Store struct {
	client *clientv3.Client
	server *embed.Etcd // nil for an external cluster
	room   *room       // nil for an external cluster
}

var _ controlplane.Store = (*Store)(nil)

// Open starts an etcd member in dir, inside this process, and returns a store
// on it. It listens on nothing: etcd's default ports would let any local user
// in. One process at a time may open a directory; the caller sees to that.
func Open(ctx context.Context, dir string, log *slog.Logger) (*Store, error) {
	return openWithin(ctx, dir, quotaBytes, reserve, log)
}

func openWithin(ctx context.Context, dir string, quota int64, reserve uint64, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the store's directory: %w", err)
	}
	room := &room{dir: dir, reserve: reserve, log: log}
	if err := room.forStart(); err != nil {
		return nil, fmt.Errorf("starting the embedded store: %w", err)
	}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.Name = filepath.Clean(dir), "belay"
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	// The only member has nobody to wait for: elected in a fifth of a second
	// instead of a whole one.
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.ListenPeerUrls, cfg.ListenClientUrls, cfg.ListenClientHttpUrls = nil, nil, nil
	cfg.AdvertiseClientUrls = nil
	cfg.MaxTxnOps = controlplane.MaxTxnOps + 8
	cfg.MaxRequestBytes = maxRequestBytes
	cfg.QuotaBackendBytes = quota
	cfg.AutoCompactionMode = embed.CompactorModePeriodic
	cfg.AutoCompactionRetention = retention
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder((&lastWords{room: room, exit: os.Exit}).logger())

	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("starting the embedded store in %s: %w", dir, err)
	}
	s := &Store{server: server, room: room}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		server.Close()
		return nil, fmt.Errorf("starting the embedded store in %s: %w", dir, err)
	case <-server.Server.StopNotify():
		server.Close()
		return nil, fmt.Errorf("the embedded store in %s stopped while starting", dir)
	case <-ctx.Done():
		server.Close()
		return nil, fmt.Errorf("starting the embedded store in %s: not ready in time: %w", dir, ctx.Err())
	}
	s.client = v3client.New(server.Server)
	if err := s.makeRoom(ctx, log); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("starting the embedded store in %s: %w", dir, err)
	}
	return s, nil
}

// makeRoom gives back the space of what was deleted and lifts the write stop
// of a store that was full. etcd does neither by itself, and nothing but this
// process reaches an embedded one. If it is still full, the first write says so
// again.
func (s *Store) makeRoom(ctx context.Context, log *slog.Logger) error {
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("reading its alarms: %w", err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm != etcdserverpb.AlarmType_NOSPACE {
			continue
		}
		log.Warn("the store had reached its size limit: defragmenting it, which may take minutes")
		rev, err := s.Revision(ctx)
		if err != nil {
			return err
		}
		if _, err := s.client.Compact(ctx, rev, clientv3.WithCompactPhysical()); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("compacting it: %w", err)
		}
		// Not by the client: the maintenance service needs a gRPC server.
		if err := s.server.Server.Backend().Defrag(); err != nil {
			return fmt.Errorf("defragmenting it: %w", err)
		}
		if _, err := s.client.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a)); err != nil {
			return fmt.Errorf("lifting its write stop: %w", err)
		}
	}
	return nil
}

// Connect returns a store on an external etcd cluster, which must be the
// control plane's alone, and fails when none of endpoints answers.
func Connect(ctx context.Context, endpoints []string, log *slog.Logger) (*Store, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            endpoints,
		DialTimeout:          dialTimeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		MaxCallSendMsgSize:   2 * maxRequestBytes,
		Logger:               zap.New(&core{log: log.With("from", "etcd")}),
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %v: %w", endpoints, err)
	}
	s := &Store{client: client}
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	if _, err := s.Revision(ctx); err != nil {
		client.Close()
		return nil, fmt.Errorf("connecting to etcd at %v: %w", endpoints, err)
	}
	return s, nil
}

// Err tells of an embedded server that died by itself; it never delivers for
// an external cluster.
func (s *Store) Err() <-chan error {
	if s.server == nil {
		return nil
	}
	return s.server.Err()
}

// Close ends watches, and for an embedded store flushes and stops it.
func (s *Store) Close() error {
	err := s.client.Close()
	if s.server != nil {
		s.server.Close()
	}
	if errors.Is(err, context.Canceled) {
		err = nil // what an in-process client always answers
	}
	return err
}

// Get implements controlplane.Store.
func (s *Store) Get(ctx context.Context, key string) (controlplane.KV, error) {
	r, err := s.client.Get(ctx, key)
	if err != nil {
		return controlplane.KV{}, failure("reading", err)
	}
	if len(r.Kvs) == 0 {
		return controlplane.KV{Key: key}, nil
	}
	return controlplane.KV{Key: key, Value: present(r.Kvs[0].Value), ModRevision: r.Kvs[0].ModRevision}, nil
}

// listPage bounds one answer of the server: a list of everything is read in
// pages at one revision, not in one message of unbounded size.
const listPage = 5000

// List implements controlplane.Store.
func (s *Store) List(ctx context.Context, prefix, after string, limit int) ([]controlplane.KV, int64, error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	if prefix == "" {
		from, end = "\x00", "\x00" // etcd's way of saying: all keys
	}
	if after != "" && after+"\x00" > from {
		from = after + "\x00"
	}
	var kvs []controlplane.KV
	var revision int64
	for {
		n := listPage
		if limit > 0 {
			n = min(n, limit-len(kvs))
		}
		r, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(int64(n)), clientv3.WithRev(revision))
		if err != nil {
			return nil, 0, failure("listing", err)
		}
		if revision == 0 {
			revision = r.Header.Revision
		}
		for _, kv := range r.Kvs {
			kvs = append(kvs, controlplane.KV{Key: string(kv.Key), Value: present(kv.Value), ModRevision: kv.ModRevision})
		}
		if !r.More || limit > 0 && len(kvs) >= limit {
			return kvs, revision, nil
		}
		from = kvs[len(kvs)-1].Key + "\x00"
	}
}

// Txn implements controlplane.Store.
func (s *Store) Txn(ctx context.Context, compares []controlplane.Compare, ops []controlplane.Op) (int64, bool, error) {
	if len(ops) > controlplane.MaxTxnOps || len(compares) > controlplane.MaxTxnOps {
		return 0, false, controlplane.Errorf(controlplane.InvalidArgument,
			"a transaction of %d operations and %d comparisons: at most %d are allowed", len(ops), len(compares), controlplane.MaxTxnOps)
	}
	if s.room != nil && len(ops) > 0 {
		if err := s.room.forWrite(); err != nil {
			return 0, false, err
		}
	}
	cmps := make([]clientv3.Cmp, len(compares))
	for i, c := range compares {
		cmps[i] = clientv3.Compare(clientv3.ModRevision(c.Key), "=", c.ModRevision)
	}
	then := make([]clientv3.Op, len(ops))
	for i, o := range ops {
		if o.Delete {
			then[i] = clientv3.OpDelete(o.Key)
		} else {
			then[i] = clientv3.OpPut(o.Key, string(o.Value))
		}
	}
	r, err := s.client.Txn(ctx).If(cmps...).Then(then...).Commit()
	if err != nil {
		return 0, false, failure("writing", err)
	}
	return r.Header.Revision, r.Succeeded, nil
}

// Revision implements controlplane.Store.
func (s *Store) Revision(ctx context.Context) (int64, error) {
	r, err := s.client.Get(ctx, "/", clientv3.WithCountOnly())
	if err != nil {
		return 0, failure("reading", err)
	}
	return r.Header.Revision, nil
}

// Watch implements controlplane.Store.
func (s *Store) Watch(ctx context.Context, prefix string, from int64, f func(controlplane.Change) error) error {
	// Its own context: an early return must end the watch at the server too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithRev(from + 1)}
	for r := range s.client.Watch(clientv3.WithRequireLeader(ctx), prefix, opts...) {
		if r.CompactRevision != 0 {
			return controlplane.ErrCompacted
		}
		if err := r.Err(); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return failure("watching", err)
		}
		for _, c := range changes(r.Events) {
			if err := f(c); err != nil {
				return err
			}
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return controlplane.Errorf(controlplane.Unavailable, "watching the store: the stream ended")
}

// changes groups events by revision: without fragments asked for, an answer
// of etcd holds whole revisions, in order.
func changes(events []*clientv3.Event) []controlplane.Change {
	var cs []controlplane.Change
	for _, e := range events {
		kv := controlplane.KV{Key: string(e.Kv.Key), ModRevision: e.Kv.ModRevision}
		if e.Type == clientv3.EventTypePut {
			kv.Value = present(e.Kv.Value)
		}
		if n := len(cs); n == 0 || cs[n-1].Revision != kv.ModRevision {
			cs = append(cs, controlplane.Change{Revision: kv.ModRevision})
		}
		last := &cs[len(cs)-1]
		last.KVs = append(last.KVs, kv)
	}
	return cs
}

// present keeps an empty value apart from no value.
func present(v []byte) []byte {
	if v == nil {
		return []byte{}
	}
	return v
}

func failure(doing string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		// Not Exhausted: to a device that enrols, that is a used-up activation.
		return controlplane.Errorf(controlplane.Unavailable,
			"%s the store: it has reached its size limit of %d MiB; delete what is not needed and start the control plane again: %w", doing, quotaBytes>>20, err)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return controlplane.Errorf(controlplane.InvalidArgument, "%s the store: the object is too large: %w", doing, err)
	case errors.Is(err, rpctypes.ErrCompacted):
		return controlplane.ErrCompacted
	}
	return controlplane.Errorf(controlplane.Unavailable, "%s the store: %w", doing, err)
}
