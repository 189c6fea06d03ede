package controlplane

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"
)

// life is one start of a control plane on its store. The list of them is what
// tells a store that was restored from a backup: devices know of lives, or of
// revisions within them, that it does not have.
type life struct {
	ID string `json:"id"`
	// From is the store's revision as the life began: whatever was written
	// after it is not of an earlier life.
	From  int64     `json:"from"`
	Began time.Time `json:"began"`
}

// maxLives bounds the list. A device that has been away for longer than so
// many starts is taken for one that knows more than the store. One control
// plane at a time serves from a store: with two, devices of the one would be in
// conflict with the other.
const maxLives = 1024

// lives are the known lives of the store, the present one last.
type lives struct {
	mu      sync.Mutex
	list    []life
	id      string // of this process; "" until it is in the store
	written int64  // the highest revision this process has written
}

// Mark implements Devices.
func (p *Plane) Mark() (life string, revision int64) {
	p.lives.mu.Lock()
	defer p.lives.mu.Unlock()
	return p.lives.id, max(p.lives.written, p.state.at())
}

func (p *Plane) wrote(revision int64) {
	p.lives.mu.Lock()
	defer p.lives.mu.Unlock()
	p.lives.written = max(p.lives.written, revision)
}

// begin enters this life into the store, once. Nothing is written before it: a
// device must never rely on what no life vouches for.
func (p *Plane) begin(ctx context.Context) error {
	p.lives.mu.Lock()
	done := p.lives.id != ""
	p.lives.mu.Unlock()
	if done {
		return nil
	}
	if err := p.beginning.lock(ctx); err != nil {
		return err
	}
	defer p.beginning.unlock()
	id, err := p.newID()
	if err != nil {
		return err
	}
	id = id[:16]
	for range maxTries {
		kv, err := p.store.Get(ctx, livesKey)
		if err != nil {
			return fmt.Errorf("reading the lives of the store: %w", err)
		}
		var list []life
		if kv.ModRevision != 0 {
			if err := json.Unmarshal(kv.Value, &list); err != nil {
				return fmt.Errorf("reading the lives of the store: %w", err)
			}
		}
		p.lives.mu.Lock()
		p.lives.list = list
		begun := p.lives.id != ""
		p.lives.mu.Unlock()
		if begun {
			return nil
		}
		if n := len(list); n > 0 && list[n-1].ID == id {
			p.setLife(list, id, kv.ModRevision)
			return nil // by a try whose answer was lost
		}
		from, err := p.store.Revision(ctx)
		if err != nil {
			return fmt.Errorf("beginning a life of the store: %w", err)
		}
		list = append(list, life{ID: id, From: from, Began: p.now()})
		list = list[max(0, len(list)-maxLives):]
		b, err := json.Marshal(list)
		if err != nil {
			return fmt.Errorf("beginning a life of the store: %w", err)
		}
		revision, ok, err := p.store.Txn(ctx, []Compare{{livesKey, kv.ModRevision}}, []Op{Put(livesKey, b)})
		if err != nil {
			return fmt.Errorf("beginning a life of the store: %w", err)
		}
		if ok {
			p.setLife(list, id, revision)
			return nil
		}
	}
	return Errorf(Conflict, "beginning a life of the store: others kept beginning theirs: is there a second control plane on it?")
}

func (p *Plane) setLife(list []life, id string, revision int64) {
	p.lives.mu.Lock()
	defer p.lives.mu.Unlock()
	p.lives.list, p.lives.id = list, id
	p.lives.written = max(p.lives.written, revision)
}

// has tells whether a mark is of the store's own history: its life is known,
// and its revision is none that came after the life's end.
func (l *lives) has(mark Mark, now int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.IndexFunc(l.list, func(one life) bool { return one.ID == mark.Life })
	switch {
	case i < 0:
		return false
	case mark.Life == l.id:
		return true // told by this process
	case i+1 < len(l.list):
		return mark.Revision <= l.list[i+1].From
	}
	return mark.Revision <= now
}
