package carrier

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
)

func TestKnockAndCome(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes, c.HandshakeRate = 8, 1 })
	ctx := within(t, 10*time.Second)
	let, begun := 0, time.Now()
	dial := func() (wire.Session, error) {
		cfg := r.config(wire.TransportQUIC)
		cfg.Knock, cfg.Let = true, func() { let++ }
		return Dial(ctx, cfg)
	}
	for range 2 {
		agent, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer agent.Close("", "")
		control, err := r.l.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer control.Close("", "")
		echo(t, agent, control)
	}
	// A quiet time lets two in and the one that is due.
	for let < 4+int(time.Since(begun).Seconds()) {
		s, err := dial()
		if err == nil {
			s.Close("", "")
			continue
		}
		if let < 3 {
			t.Errorf("only %d were let in", let)
		}
		var busy *BusyError
		if !errors.As(err, &busy) || !errors.Is(err, ErrBusy) || !errors.Is(err, ErrUnreachable) {
			t.Fatalf("one too many: %v, want %v", err, ErrBusy)
		}
		if busy.Again < soonest || busy.Again > 2*time.Second {
			t.Errorf("asked to ask again in %s", busy.Again)
		}
		return
	}
	t.Errorf("%d were let in within %s, at one a second", let, time.Since(begun))
}

// TestNobodyIsLetInWhileHandshakesAreSlow: these never end.
func TestNobodyIsLetInWhileHandshakesAreSlow(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes, c.HandshakeRate = 16, 1000 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var stalled sync.WaitGroup
	defer stalled.Wait()
	defer cancel()
	answered := make(chan struct{})
	stall := func(n int) {
		for range n {
			stalled.Go(func() {
				cfg := r.config(wire.TransportQUIC)
				cfg.Answered = func() { answered <- struct{}{}; <-ctx.Done() }
				if s, err := Dial(ctx, cfg); err == nil {
					s.Close("", "")
				}
			})
		}
		for range n {
			<-answered
		}
	}
	stall(4) // a quarter, all of one source
	at := addrPort(r.l.udp.LocalAddr())
	if err := ask(within(t, 5*time.Second), knocker(t), at); !errors.Is(err, ErrBusy) {
		t.Errorf("a fifth is told %v, want %v", err, ErrBusy)
	}
	stall(4) // as many as one source may have
	other, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 9)})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := ask(within(t, 5*time.Second), other, at); err != nil {
		t.Errorf("another source is told %v", err)
	}
}

// TestAnswersComeFromWhereWasKnocked: a control plane with more than one address
// listens on all of them.
func TestAnswersComeFromWhereWasKnocked(t *testing.T) {
	for _, listen := range []string{":0", "0.0.0.0:0"} {
		r := newRig(t, func(c *ListenConfig) { c.Address = listen })
		port := addrPort(r.l.udp.LocalAddr()).Port()
		for _, ip := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
			at := netip.AddrPortFrom(netip.MustParseAddr(ip), port)
			if at.Addr().Is6() && (listen != ":0" || !hasIPv6()) {
				continue
			}
			if err := ask(within(t, 2*time.Second), knocker(t), at); err != nil {
				t.Errorf("listening on %s, knocked at %s: %v", listen, at, err)
			}
			cfg := r.config(wire.TransportQUIC)
			cfg.Address, cfg.Knock = at.String(), true
			s, err := Dial(within(t, 5*time.Second), cfg)
			if err != nil {
				t.Fatal(err)
			}
			s.Close("", "")
		}
	}
}

func hasIPv6() bool {
	c, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// TestBehindANAT: where the address that was knocked at is none of the control
// plane's, it answers all the same.
func TestBehindANAT(t *testing.T) {
	r := newRig(t, nil)
	sock := knocker(t)
	for _, at := range []string{"198.51.100.7", "2001:db8::7", "::"} {
		question := append(bytes.Clone(knockHead), make([]byte, knockSize-len(knockHead))...)
		ip := netip.MustParseAddr(at).As16()
		copy(question[len(knockHead)+tokenSize:], ip[:])
		if _, err := sock.WriteToUDPAddrPort(question, addrPort(r.l.udp.LocalAddr())); err != nil {
			t.Fatal(err)
		}
		_ = sock.SetReadDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 100)
		if n, err := sock.Read(b); err != nil || !bytes.HasPrefix(b[:n], hereHead) {
			t.Errorf("knocked at %s: %q, %v", at, b[:n], err)
		}
	}
}

// knocker is a socket that knocks by hand.
func knocker(t *testing.T) *net.UDPConn {
	t.Helper()
	sock, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sock.Close() })
	return sock
}

func TestWhatIsNoKnockIsNotAnswered(t *testing.T) {
	r := newRig(t, nil)
	sock := knocker(t)
	right := append(bytes.Clone(knockHead), make([]byte, knockSize-len(knockHead))...)
	for _, b := range [][]byte{right[:knockSize-1], {0}, nudge, bytes.Repeat([]byte{0}, knockSize), hereHead} {
		if _, err := sock.WriteToUDPAddrPort(b, addrPort(r.l.udp.LocalAddr())); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 100)
	_ = sock.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := sock.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answered %q, %v", b[:n], err)
	}
	// A later version may say more.
	if _, err := sock.WriteToUDPAddrPort(append(right, "more"...), addrPort(r.l.udp.LocalAddr())); err != nil {
		t.Fatal(err)
	}
	_ = sock.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, err := sock.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if n >= knockSize || !bytes.HasPrefix(b[:n], hereHead) {
		t.Errorf("answered %d bytes: %q", n, b[:n])
	}
}

// TestOnlyTheRightAnswerCounts: what answers is another port, another knock's,
// cut short, and at last the right one, to the second knock only.
func TestOnlyTheRightAnswerCounts(t *testing.T) {
	server, other, sock := knocker(t), knocker(t), knocker(t)
	served := make(chan error, 1)
	go func() {
		served <- func() error {
			b := make([]byte, 100)
			for n := 0; ; n++ {
				size, from, err := server.ReadFromUDPAddrPort(b)
				if err != nil {
					return err
				}
				right, _ := answerTo(b[:size], func() time.Duration { return 7 * againUnit })
				wrong := bytes.Clone(right)
				wrong[len(hereHead)]++
				come, _ := answerTo(b[:size], func() time.Duration { return 0 })
				_, err1 := other.WriteToUDPAddrPort(come, from)
				_, err2 := server.WriteToUDPAddrPort(wrong, from)
				_, err3 := server.WriteToUDPAddrPort(right[:len(right)-1], from)
				if err := errors.Join(err1, err2, err3); err != nil || n == 1 {
					_, err4 := server.WriteToUDPAddrPort(right, from)
					return errors.Join(err, err4)
				}
			}
		}()
	}()
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), addrPort(server.LocalAddr()).Port())
	begun := time.Now()
	var busy *BusyError
	if err := ask(within(t, 10*time.Second), sock, to); !errors.As(err, &busy) || busy.Again != 7*againUnit {
		t.Errorf("told %v, want to ask again in %s", err, 7*againUnit)
	}
	if took := time.Since(begun); took < knockAgain {
		t.Errorf("the second knock came after %s, want %s", took, knockAgain)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestNobodyAnswersAKnock(t *testing.T) {
	silent, sock := knocker(t), knocker(t)
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), addrPort(silent.LocalAddr()).Port())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if err := ask(ctx, sock, to); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want %v", err, context.DeadlineExceeded)
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("gave up after %s", took)
	}
}

// TestTurns: whoever knocks, and when: no more are let in within any time than
// the rate and the burst allow, nobody while occupied, the others are asked to
// come back at that rate, and after a quiet time there is room.
func TestTurns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		burst, rate := rapid.IntRange(1, 256).Draw(t, "burst"), rapid.IntRange(1, 4000).Draw(t, "rate")
		turns := newTurns(burst, rate)
		now := time.Unix(1e9, 0)
		var let, back []time.Time
		for range rapid.IntRange(1, 400).Draw(t, "knocks") {
			now = now.Add(time.Duration(rapid.IntRange(0, 20).Draw(t, "ms")) * time.Millisecond)
			occupied := rapid.IntRange(0, 9).Draw(t, "occupied") == 0
			again := turns.take(now, occupied)
			switch {
			case again == 0 && occupied:
				t.Fatal("let in while occupied")
			case again == 0:
				let = append(let, now)
			case again < soonest || again > latest || again%againUnit != 0:
				t.Fatalf("asked to knock again in %s", again)
			default:
				back = append(back, now.Add(again))
			}
		}
		for i := range let {
			for j := i + 1; j < len(let); j++ {
				within := let[j].Sub(let[i])
				if n, most := j-i+1, float64(burst+2)+within.Seconds()*float64(rate)*1.001; float64(n) > most {
					t.Fatalf("%d are let in within %s, want %.1f at the most", n, within, most)
				}
			}
		}
		spread := map[int64]int{} // by 100 ms
		for _, at := range back {
			spread[at.UnixMilli()/100]++
		}
		for at, n := range spread {
			// Those told to wait the least, and each time around.
			if most := float64(rate)/10*1.001 + 1 + 400/20; rate > 40 && float64(n) > most {
				t.Fatalf("%d are to be back within 100 ms at %d, want %.1f at the most", n, at, most)
			}
		}
		if again := turns.take(now.Add(time.Hour), false); again != 0 {
			t.Fatalf("after a quiet time: told to wait %s", again)
		}
	})
}

func FuzzKnock(f *testing.F) {
	knock := append(bytes.Clone(knockHead), make([]byte, knockSize-len(knockHead))...)
	f.Add(knock)
	f.Add(knockHead)
	here, _ := answerTo(knock, func() time.Duration { return latest })
	f.Add(here)
	f.Fuzz(func(t *testing.T, b []byte) {
		answer, at := answerTo(b, func() time.Duration { return 9 * againUnit })
		if answer != nil {
			sentFrom(at)
			if len(answer) > len(b) {
				t.Fatalf("%d bytes are answered with %d", len(b), len(answer))
			}
			if again, ok := answerIn(answer, b[len(knockHead):][:tokenSize]); !ok || again != 9*againUnit {
				t.Fatalf("the answer %q is not read as such", answer)
			}
		}
		answerIn(b, make([]byte, tokenSize))
	})
}
