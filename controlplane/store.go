package controlplane

import (
	"context"
	"errors"
)

// Store is the narrow view of etcd that everything else stands on. Keys are
// UTF-8, parts joined by "/". Values are whole: no partial reads or writes.
// Package storetest holds every implementation to this text.
type Store interface {
	// Get returns one key as of now, with every write acknowledged before the
	// call visible. A missing key has ModRevision 0 and a nil Value.
	Get(ctx context.Context, key string) (KV, error)
	// List returns the keys under prefix in byte order, at most limit of them
	// (0: all), starting after the key `after` ("": the first), and the
	// revision the list was read at.
	List(ctx context.Context, prefix, after string, limit int) ([]KV, int64, error)
	// Txn applies ops, all or none, if every compare holds. ok is false, and
	// nothing was written, when one does not. At most MaxTxnOps ops. After an
	// error the outcome is unknown: the caller reads before trying again.
	Txn(ctx context.Context, compares []Compare, ops []Op) (revision int64, ok bool, err error)
	// Watch calls f with every change under prefix after revision from, in
	// order, one call a revision, until ctx ends (nil), f fails (its error),
	// or the store cannot go on from there (ErrCompacted: list and watch anew).
	Watch(ctx context.Context, prefix string, from int64, f func(Change) error) error
	// Revision is the store's revision now.
	Revision(ctx context.Context) (int64, error)
}

// ErrCompacted is what Watch returns when the history it was to start from is
// gone: the caller lists again and watches from there.
var ErrCompacted = errors.New("the store has forgotten the revisions asked for")

// MaxTxnOps bounds one transaction.
const MaxTxnOps = 120

// KV is a key with its value.
type KV struct {
	Key         string
	Value       []byte
	ModRevision int64 // of the last write; 0: the key does not exist
}

// Compare holds when the key's ModRevision is this; 0: it does not exist.
type Compare struct {
	Key         string
	ModRevision int64
}

// Op writes one key, or deletes it when Delete is set.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put is the op that writes a key.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }

// Delete is the op that deletes a key.
func Delete(key string) Op { return Op{Key: key, Delete: true} }

// Change is everything one revision changed under a watched prefix.
type Change struct {
	Revision int64
	KVs      []KV // Value nil: deleted
}
