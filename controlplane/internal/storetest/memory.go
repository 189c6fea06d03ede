// Package storetest holds every controlplane.Store to its contract, and has a
// small one in memory for tests of what stands above it.
package storetest

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/belay-edge/belay/controlplane"
)

// Memory is a controlplane.Store in memory, history included.
type Memory struct {
	mu        sync.Mutex
	revision  int64
	compacted int64 // revisions up to here are forgotten
	kvs       map[string]controlplane.KV
	history   []controlplane.Change
	changed   chan struct{} // closed and replaced at every write
	fail      func(op string) error
}

var _ controlplane.Store = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{revision: 1, kvs: map[string]controlplane.KV{}, changed: make(chan struct{})}
}

// FailWith makes every later call return f's error, when it gives one. The op
// "txn-answer" is asked after a transaction was applied: its answer is lost.
func (m *Memory) FailWith(f func(op string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = f
}

// Compact forgets the history so far.
func (m *Memory) Compact() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.compacted, m.history = m.revision, nil
}

// Copy is a backup: another store with the same content and history.
func (m *Memory) Copy() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Memory{
		revision: m.revision, compacted: m.compacted, kvs: maps.Clone(m.kvs),
		history: slices.Clone(m.history), changed: make(chan struct{}),
	}
}

func (m *Memory) failure(op string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(op)
}

// Get implements controlplane.Store.
func (m *Memory) Get(ctx context.Context, key string) (controlplane.KV, error) {
	if err := ctx.Err(); err != nil {
		return controlplane.KV{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failure("get"); err != nil {
		return controlplane.KV{}, err
	}
	kv, ok := m.kvs[key]
	if !ok {
		return controlplane.KV{Key: key}, nil
	}
	return kv, nil
}

// List implements controlplane.Store.
func (m *Memory) List(ctx context.Context, prefix, after string, limit int) ([]controlplane.KV, int64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failure("list"); err != nil {
		return nil, 0, err
	}
	var kvs []controlplane.KV
	for k, kv := range m.kvs {
		if strings.HasPrefix(k, prefix) && (after == "" || k > after) {
			kvs = append(kvs, kv)
		}
	}
	slices.SortFunc(kvs, func(a, b controlplane.KV) int { return strings.Compare(a.Key, b.Key) })
	if limit > 0 && len(kvs) > limit {
		kvs = kvs[:limit]
	}
	return kvs, m.revision, nil
}

// Txn implements controlplane.Store.
func (m *Memory) Txn(ctx context.Context, compares []controlplane.Compare, ops []controlplane.Op) (int64, bool, error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	if len(ops) > controlplane.MaxTxnOps || len(compares) > controlplane.MaxTxnOps {
		return 0, false, controlplane.Errorf(controlplane.InvalidArgument, "too many operations in a transaction: %d", len(ops))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.failure("txn"); err != nil {
		return 0, false, err
	}
	for _, c := range compares {
		if m.kvs[c.Key].ModRevision != c.ModRevision {
			return m.revision, false, nil
		}
	}
	change := controlplane.Change{Revision: m.revision + 1}
	for _, o := range ops {
		kv := controlplane.KV{Key: o.Key, ModRevision: change.Revision}
		if o.Delete {
			if _, ok := m.kvs[o.Key]; !ok {
				continue
			}
			delete(m.kvs, o.Key)
		} else {
			kv.Value = append([]byte{}, o.Value...)
			m.kvs[o.Key] = kv
		}
		change.KVs = append(change.KVs, kv)
	}
	if len(change.KVs) > 0 {
		m.revision++
		m.history = append(m.history, change)
		close(m.changed)
		m.changed = make(chan struct{})
	}
	if err := m.failure("txn-answer"); err != nil {
		return 0, false, err
	}
	return m.revision, true, nil
}

// Watch implements controlplane.Store.
func (m *Memory) Watch(ctx context.Context, prefix string, from int64, f func(controlplane.Change) error) error {
	for {
		m.mu.Lock()
		if err := m.failure("watch"); err != nil {
			m.mu.Unlock()
			return err
		}
		if from < m.compacted {
			m.mu.Unlock()
			return controlplane.ErrCompacted
		}
		i, _ := slices.BinarySearchFunc(m.history, from+1, func(c controlplane.Change, r int64) int { return int(c.Revision - r) })
		pending, changed := slices.Clone(m.history[i:]), m.changed
		m.mu.Unlock()
		for _, c := range pending {
			from = c.Revision
			seen := controlplane.Change{Revision: c.Revision}
			for _, kv := range c.KVs {
				if strings.HasPrefix(kv.Key, prefix) {
					seen.KVs = append(seen.KVs, kv)
				}
			}
			if ctx.Err() != nil {
				return nil
			}
			if len(seen.KVs) > 0 {
				if err := f(seen); err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// Revision implements controlplane.Store.
func (m *Memory) Revision(ctx context.Context) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.revision, m.failure("revision")
}
