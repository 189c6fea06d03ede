package carrier

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"net"
	"net/netip"
	"time"
)

// A knock asks a control plane whether it is there and when it has time for a
// handshake. It costs a device that cannot reach any 60 bytes where the begin of
// a handshake, repeated as often as QUIC does, costs 10,000; and a control plane
// on which thousands knock tells each a time of its own, before anything is
// computed.
//
//	knock:  "\x00belay knock 1\n", 8 bytes of the device's choice, zeros up to knockSize
//	answer: "\x00belay here 1\n", the same 8 bytes, 2 bytes: when to come, in 10 ms from now
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
	// turnUnit is what an answer counts time in, and later its largest value:
	// no time is free that is near enough to be promised.
	turnUnit = 10 * time.Millisecond
	later    = 1<<16 - 1
	// knockAgain is how long after a knock the next, and twice as long after
	// that: one of them may get lost.
	knockAgain = 500 * time.Millisecond
)

// ask knocks until it is answered and returns how long to wait then before the
// handshake. Nobody may read from the socket meanwhile. Errors: ErrBusy, those of
// ctx and of sending.
func ask(ctx context.Context, sock *net.UDPConn, addr netip.AddrPort) (time.Duration, error) {
	question := make([]byte, knockSize)
	copy(question, knockHead)
	token := question[len(knockHead):][:tokenSize]
	_, _ = rand.Read(token) // never fails
	defer func() { _ = sock.SetReadDeadline(time.Time{}) }()
	stop := context.AfterFunc(ctx, func() { _ = sock.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 64)
	for pause := knockAgain; ; pause *= 2 {
		if _, err := sock.WriteToUDPAddrPort(question, addr); err != nil {
			return 0, err
		}
		_ = sock.SetReadDeadline(time.Now().Add(pause))
		for ctx.Err() == nil {
			n, from, err := sock.ReadFromUDPAddrPort(b)
			if err != nil {
				break
			}
			if turn, ok := answerIn(b[:n], token); ok && netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) == netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()) {
				if turn == later {
					return 0, ErrBusy
				}
				return time.Duration(turn) * turnUnit, nil
			}
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
}

// answerIn reads an answer to the knock with that token.
func answerIn(b, token []byte) (turn uint16, ok bool) {
	rest, ok := bytes.CutPrefix(b, hereHead)
	if !ok || len(rest) < tokenSize+2 || !bytes.Equal(rest[:tokenSize], token) {
		return 0, false
	}
	return binary.BigEndian.Uint16(rest[tokenSize:]), true
}

// answerTo makes the answer to a knock; nil: it is none.
func answerTo(b []byte, turn func() uint16) []byte {
	if len(b) < knockSize || !bytes.HasPrefix(b, knockHead) {
		return nil
	}
	answer := append(bytes.Clone(hereHead), b[len(knockHead):][:tokenSize]...)
	return binary.BigEndian.AppendUint16(answer, turn())
}

// answerKnocks runs until the listener is closed. What it cannot keep up with is
// dropped by the socket and by quic-go's queue, and is repeated by who knocked.
func (l *Listener) answerKnocks() {
	turns := newTurns(l.cfg.MaxHandshakes, l.cfg.HandshakeRate)
	b := make([]byte, 64)
	for {
		n, from, err := l.tr.ReadNonQUICPacket(l.ctx, b)
		if err != nil {
			return
		}
		answer := answerTo(b[:n], func() uint16 {
			if l.quicConns.Load() >= int64(l.cfg.MaxConns) {
				return later
			}
			return turns.take(time.Now())
		})
		if answer != nil {
			// It may as well have got lost on the way.
			_, _ = l.tr.WriteTo(answer, from)
		}
	}
}

// mostTurn is the furthest time that is promised: a device that gives up, or
// none at all that knocked, keeps it from others.
const mostTurn = 30 * time.Second

// turns are the times at which handshakes may begin: so many a second, and some
// at once after a quiet time.
type turns struct {
	every, burst time.Duration
	next         time.Time
}

func newTurns(burst, rate int) *turns {
	every := time.Second / time.Duration(rate)
	return &turns{every: every, burst: time.Duration(burst/2) * every}
}

// take returns the next time, in turnUnit from now, or later.
func (t *turns) take(now time.Time) uint16 {
	if quiet := now.Add(-t.burst); t.next.Before(quiet) {
		t.next = quiet
	}
	wait := max(0, t.next.Sub(now))
	if wait > mostTurn {
		return later
	}
	t.next = t.next.Add(t.every)
	return uint16(wait / turnUnit)
}
