package state

import "slices"

// newer keeps what a newer agent wrote and this one does not know, through
// every rewrite of the log: whole records of unknown sorts, all of them in
// their order, and known ones with more in them until this agent has something
// newer of that sort to say.
type newer struct {
	extended map[sort][]byte // payloads
	unknown  []entry
	size     int // bytes of unknown
}

// sort tells records apart of which the latest counts.
type sort struct{ task, kind, name string }

// A log of another sort altogether must not fill the memory.
const (
	mostNewer      = 4096
	mostNewerBytes = 1 << 20
)

func sortOf(e entry) sort {
	switch {
	case e.Applied != nil:
		return sort{kind: "applied"}
	case e.Doubt != nil:
		return sort{kind: "doubt"}
	case e.Away != nil:
		return sort{kind: "away"}
	case e.Unused != nil:
		return sort{kind: "unused"}
	case e.Desired != nil:
		return sort{e.Task, "desired", ""}
	case e.Status != nil:
		return sort{e.Task, "status", ""}
	case e.Origin != "":
		return sort{e.Task, "origin", ""}
	case e.Attempt != nil:
		return sort{e.Task, "attempt", e.Attempt.Container}
	}
	return sort{}
}

func (n *newer) apply(e entry) {
	switch {
	case e.Forget:
		n.unknown = slices.DeleteFunc(n.unknown, func(o entry) bool {
			if o.Task == e.Task {
				n.size -= len(o.raw)
			}
			return o.Task == e.Task
		})
		for s := range n.extended {
			if s.task == e.Task {
				delete(n.extended, s)
			}
		}
	case e.raw == nil:
		delete(n.extended, sortOf(e))
	case e.known():
		if n.extended == nil {
			n.extended = map[sort][]byte{}
		}
		n.extended[sortOf(e)] = e.raw
	default:
		n.unknown = append(n.unknown, e)
		for n.size += len(e.raw); len(n.unknown) > mostNewer || n.size > mostNewerBytes; n.unknown = n.unknown[1:] {
			n.size -= len(n.unknown[0].raw)
		}
	}
}
