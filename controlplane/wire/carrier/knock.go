package carrier

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A knock asks a control plane whether it is there and has time for a handshake.
// It costs a device that cannot reach any 530 bytes in 2.5 s where a handshake,
// begun and repeated as often as QUIC does, costs 10,000; and a control plane on
// which thousands knock lets in as many as it gets done with, and tells each of
// the others a time of its own to knock again, before anything is computed.
//
//	knock:  "\x00belay knock 1\n", 8 bytes of the device's choice, 16 bytes: the address it knocks at, zeros up to knockSize
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
	knockSize = 48
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
	at := addr.Addr().As16()
	copy(question[len(knockHead)+tokenSize:], at[:])
	defer func() { _ = sock.SetReadDeadline(time.Time{}) }()
	stop := context.AfterFunc(ctx, func() { _ = sock.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	b := make([]byte, 64)
	pause := knockAgain
	for n := 1; ; n++ {
		if n > knockOften {
			pause *= 2
		}
		// Linux may refuse the first packet of a flow that its firewall has to look
		// up, and none after it.
		if _, err := sock.WriteToUDPAddrPort(question, addr); err != nil && (n > 1 || !errors.Is(err, syscall.EPERM)) {
			return err
		}
		_ = sock.SetReadDeadline(time.Now().Add(pause))
		for ctx.Err() == nil {
			n, from, err := sock.ReadFromUDPAddrPort(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
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

// answerTo makes the answer to a knock, and says at which address it was; nil:
// it is none.
func answerTo(b []byte, again func() time.Duration) (answer []byte, at netip.Addr) {
	if len(b) < knockSize || !bytes.HasPrefix(b, knockHead) {
		return nil, at
	}
	rest := b[len(knockHead):]
	answer = append(bytes.Clone(hereHead), rest[:tokenSize]...)
	at = netip.AddrFrom16([16]byte(rest[tokenSize:])).Unmap()
	return binary.BigEndian.AppendUint16(answer, uint16(again()/againUnit)), at
}

// answerKnocks runs until the listener is closed. What it cannot keep up with is
// dropped by the socket and by quic-go's queue, and is repeated by who knocked.
func (l *Listener) answerKnocks() {
	turns := newTurns(max(1, l.cfg.MaxHandshakes/4), l.cfg.HandshakeRate)
	b := make([]byte, 64)
	for {
		n, from, err := l.tr.ReadNonQUICPacket(l.ctx, b)
		if err != nil {
			return
		}
		answer, at := answerTo(b[:n], func() time.Duration { return turns.take(time.Now(), l.occupied(from)) })
		to, ok := from.(*net.UDPAddr)
		if answer == nil || !ok {
			continue
		}
		// From the address that was knocked at, where that is one of ours and not a
		// NAT's: who knocked, and a firewall on the way, take the answer from no
		// other. It may as well have got lost on the way.
		if _, _, err := l.udp.WriteMsgUDP(answer, sentFrom(at), to); err != nil {
			_, _ = l.udp.WriteToUDP(answer, to)
		}
	}
}

// sentFrom is the control message of a datagram that is to leave from an
// address of ours.
func sentFrom(at netip.Addr) []byte {
	switch {
	case at.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: at.As4()})
	case at.IsUnspecified():
		return nil
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: at.As16()})
}

// occupied tells whether there are as many handshakes over QUIC under way as
// are done well: fewer than are refused, and more than those of one source can
// be.
func (l *Listener) occupied(from net.Addr) bool {
	return l.quicFresh.Load() >= int64(max(1, l.cfg.MaxHandshakes*3/4)) || l.quicConns.Load() >= int64(l.cfg.MaxConns) ||
		l.fresh.Held(from) >= max(1, l.cfg.MaxHandshakes/4)
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
