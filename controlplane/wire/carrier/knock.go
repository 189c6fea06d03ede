package carrier

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// A knock asks a control plane whether it is there and has time for a handshake.
// It costs a device that cannot reach any 420 bytes in 2.5 s where a handshake,
// begun and repeated as often as QUIC does, costs 10,000; and a control plane on
// which thousands knock lets in as many as it gets done with, and tells each of
// the others a time of its own to knock again, before anything is computed.
//
//	knock:  "\x00belay knock 1\n", 8 bytes of the device's choice, zeros up to knockSize
//	answer: "\x00belay here 1\n", the same 8 bytes, 2 bytes: 0 to come, or when to knock again, in 10 ms
//
// Both are no packets of QUIC by their first byte, see nudge. More may follow in
// a later version. The answer is shorter than the knock, so that nobody gains by
// knocking in another's name.
var (
	knockHead = []byte("\x00belay knock 1\n")
	hereHead  = []byte("\x00belay here 1\n")
)

const (
	knockSize = 32
	tokenSize = 8
	againUnit = 10 * time.Millisecond
	// knockAgain is between knocks without an answer, of which there are knockOften
	// before the time between them doubles: whoever waits for a link to come back
	// is to notice at once.
	knockAgain = 400 * time.Millisecond
	knockOften = 6
)

// BusyError is an ErrBusy that says when to ask again.
type BusyError struct{ Again time.Duration }

func (e *BusyError) Error() string {
	return fmt.Sprintf("%v and asks to be asked again in %s", ErrBusy, e.Again)
}

// Is makes it an ErrBusy.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// ask knocks until it is answered; nil: the handshake may begin. Nobody may read
// from the socket meanwhile. Errors: *BusyError, those of ctx and of sending.
func ask(ctx context.Context, sock *net.UDPConn, addr netip.AddrPort) error {
	question := make([]byte, knockSize)
	copy(question, knockHead)
	token := question[len(knockHead):][:tokenSize]
	_, _ = rand.Read(token) // never fails
	defer func() { _ = sock.SetReadDeadline(time.Time{}) }()
	stop := context.AfterFunc(ctx, func() { _ = sock.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 64)
	pause := knockAgain
	for n := 1; ; n++ {
		if n > knockOften {
			pause *= 2
		}
		if _, err := sock.WriteToUDPAddrPort(question, addr); err != nil {
			return err
		}
		_ = sock.SetReadDeadline(time.Now().Add(pause))
		for ctx.Err() == nil {
			n, from, err := sock.ReadFromUDPAddrPort(b)
			if err != nil {
				break
			}
			if again, ok := answerIn(b[:n], token); ok && netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) == netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()) {
				if again > 0 {
					return &BusyError{again}
				}
				return nil
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// answerIn reads an answer to the knock with that token.
func answerIn(b, token []byte) (again time.Duration, ok bool) {
	rest, ok := bytes.CutPrefix(b, hereHead)
	if !ok || len(rest) < tokenSize+2 || !bytes.Equal(rest[:tokenSize], token) {
		return 0, false
	}
	return time.Duration(binary.BigEndian.Uint16(rest[tokenSize:])) * againUnit, true
}

// answerTo makes the answer to a knock; nil: it is none.
func answerTo(b []byte, again func() time.Duration) []byte {
	if len(b) < knockSize || !bytes.HasPrefix(b, knockHead) {
		return nil
	}
	answer := append(bytes.Clone(hereHead), b[len(knockHead):][:tokenSize]...)
	return binary.BigEndian.AppendUint16(answer, uint16(again()/againUnit))
}

// answerKnocks runs until the listener is closed. What it cannot keep up with is
// dropped by the socket and by quic-go's queue, and is repeated by who knocked.
func (l *Listener) answerKnocks() {
	turns := newTurns(l.cfg.MaxHandshakes/4, l.cfg.HandshakeRate)
	b := make([]byte, 64)
	for {
		n, from, err := l.tr.ReadNonQUICPacket(l.ctx, b)
		if err != nil {
			return
		}
		answer := answerTo(b[:n], func() time.Duration { return turns.take(time.Now(), l.occupied(from)) })
		if answer != nil {
			// It may as well have got lost on the way.
			_, _ = l.tr.WriteTo(answer, from)
		}
	}
}

// occupied tells whether there are as many handshakes over QUIC under way as
// are done well: half of those that are not refused, in all or from one source.
func (l *Listener) occupied(from net.Addr) bool {
	return l.quicFresh.Load() >= int64(l.cfg.MaxHandshakes/2) || l.quicConns.Load() >= int64(l.cfg.MaxConns) ||
		l.fresh.Held(from) >= l.cfg.MaxHandshakes/4
}

const (
	// soonest and latest are when devices that knock are asked to knock again. A
	// knock is cheap, and time that was given to devices that do not come, or
	// twice to one that has repeated its knock, is lost to the others.
	soonest = 250 * time.Millisecond
	latest  = 15 * time.Second
)

// turns lets in so many a second, and some at once after a quiet time; the
// others are told to come back at that rate, one after the other, or at a multiple
// of it.
type turns struct {
	every, burst time.Duration
	next         time.Time // when the next may be let in
	tail         time.Time // when the last is to be back
}

func newTurns(burst, rate int) *turns {
	every := time.Second / time.Duration(rate)
	return &turns{every: every, burst: time.Duration(burst) * every}
}

// take returns 0 for who may come, and for others when to knock again, in whole
// againUnit. Nobody may come while occupied.
func (t *turns) take(now time.Time, occupied bool) time.Duration {
	if quiet := now.Add(-t.burst); t.next.Before(quiet) {
		t.next = quiet
	}
	if !occupied && !t.next.After(now) {
		t.next = t.next.Add(t.every)
		return 0
	}
	t.tail = t.tail.Add(t.every)
	if t.tail.Before(now.Add(soonest)) || t.tail.After(now.Add(latest)) {
		t.tail = now.Add(soonest) // in the latter case among those told so before
	}
	return t.tail.Sub(now).Truncate(againUnit)
}
