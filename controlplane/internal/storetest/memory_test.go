package storetest

import (
	"errors"
	"testing"

	"github.com/belay-edge/belay/controlplane"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) controlplane.Store { return NewMemory() })
}

func TestMemoryCompacted(t *testing.T) {
	m := NewMemory()
	rev := put(t, m, controlplane.Put("/a", nil))
	put(t, m, controlplane.Put("/a", nil))
	m.Compact()
	if err := m.Watch(within(t), "/", rev, nil); !errors.Is(err, controlplane.ErrCompacted) {
		t.Errorf("Watch = %v, want ErrCompacted", err)
	}
}
