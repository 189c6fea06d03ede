package hub

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	// maxHoldings and maxHoldingBytes bound what one device may tell it holds.
	maxHoldings     = 10_000
	maxHoldingBytes = 32 << 20
)

// mark is the present moment of the store's history, for the device.
func (s *session) mark() *wire.Mark {
	life, revision := s.hub.devices.Mark()
	if life == "" {
		return nil
	}
	return &wire.Mark{Life: life, Revision: uint64(revision)}
}

func positionOf(h *wire.Hello) controlplane.Position {
	return controlplane.Position{
		Incarnation: h.GetIncarnation(), Sequence: h.GetSequence(),
		Mark: controlplane.Mark{Life: h.GetMark().GetLife(), Revision: int64(min(h.GetMark().GetRevision(), math.MaxInt64))},
	}
}

// holdings gathers what a device tells it holds.
type holdings struct {
	list  []*wire.Holding
	bytes int
}

func (h *holdings) add(one *wire.Holding) error {
	h.list = append(h.list, one)
	h.bytes += proto.Size(one)
	if len(h.list) > maxHoldings || h.bytes > maxHoldingBytes {
		return fmt.Errorf("%w: more than %d tasks or %d bytes of them held", wire.ErrFrame, maxHoldings, maxHoldingBytes)
	}
	return nil
}

func (h *holdings) take() []*wire.Holding {
	list := h.list
	*h = holdings{}
	return list
}

// takeHoldings reports what the device holds. False: try again later.
func (s *session) takeHoldings(hs []*wire.Holding) bool {
	ctx, cancel := s.call()
	defer cancel()
	err := s.hub.devices.ReportHoldings(ctx, s.instance, hs)
	if err != nil {
		s.complain("store what a device holds", err)
	}
	return err == nil || !passing(err)
}
