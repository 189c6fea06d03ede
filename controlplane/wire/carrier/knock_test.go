package carrier

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
)

func TestKnockAndComeInTurn(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes, c.HandshakeRate = 2, 4 })
	ctx := within(t, 10*time.Second)
	var waits []time.Duration
	begun := time.Now()
	for range 3 {
		cfg := r.config(wire.TransportQUIC)
		cfg.Knock, cfg.Turn = true, func(wait time.Duration) { waits = append(waits, wait) }
		agent, err := Dial(ctx, cfg)
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
	if len(waits) != 3 || waits[0] != 0 {
		t.Errorf("told to wait %v, want three times and nothing at first", waits)
	}
	if took, least := time.Since(begun), 200*time.Millisecond; took < least {
		t.Errorf("three handshakes at 4 a second were done after %s, want %s at least", took, least)
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

func TestNoTimeIsPromisedThatIsFarAway(t *testing.T) {
	r := newRig(t, func(c *ListenConfig) { c.MaxHandshakes, c.HandshakeRate = 2, 1 })
	at := addrPort(r.l.udp.LocalAddr())
	ctx, sock := within(t, 20*time.Second), knocker(t)
	for n := range 100 {
		wait, err := ask(ctx, sock, at)
		switch {
		case errors.Is(err, ErrBusy) && n > 25:
			return
		case err != nil:
			t.Fatalf("knock %d: %v", n, err)
		case wait > mostTurn:
			t.Fatalf("knock %d: told to come in %s", n, wait)
		}
	}
	t.Error("a hundred were told to come, one a second")
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
				right := answerTo(b[:size], func() uint16 { return 7 })
				wrong := bytes.Clone(right)
				wrong[len(hereHead)]++
				_, err1 := other.WriteToUDPAddrPort(answerTo(b[:size], func() uint16 { return 1 }), from)
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
	wait, err := ask(within(t, 10*time.Second), sock, to)
	if err != nil || wait != 7*turnUnit {
		t.Errorf("told to come in %s, %v, want %s", wait, err, 7*turnUnit)
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
	if _, err := ask(ctx, sock, to); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want %v", err, context.DeadlineExceeded)
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("gave up after %s", took)
	}
}

// TestTurns: whoever knocks, and when: times are promised in order, no more in
// any stretch of time than the rate and the burst allow, and soon again after a
// quiet time.
func TestTurns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		burst, rate := rapid.IntRange(2, 1024).Draw(t, "burst"), rapid.IntRange(1, 4000).Draw(t, "rate")
		turns := newTurns(burst, rate)
		now := time.Unix(1e9, 0)
		var promised []time.Time
		for range rapid.IntRange(1, 300).Draw(t, "knocks") {
			now = now.Add(time.Duration(rapid.IntRange(0, 50).Draw(t, "ms")) * time.Millisecond)
			wait := turns.take(now)
			if wait == later {
				continue
			}
			if d := time.Duration(wait) * turnUnit; d > mostTurn {
				t.Fatalf("promised in %s", d)
			}
			promised = append(promised, now.Add(time.Duration(wait)*turnUnit))
		}
		for i := range promised {
			for j := i + 1; j < len(promised); j++ {
				within := promised[j].Sub(promised[i])
				if within < -turnUnit {
					t.Fatalf("%s was promised after %s", promised[j], promised[i])
				}
				if n, most := j-i+1, float64(burst/2+2)+(within+turnUnit).Seconds()*float64(rate)*1.001; float64(n) > most {
					t.Fatalf("%d come within %s, want %.1f at the most", n, within, most)
				}
			}
		}
		if wait := turns.take(now.Add(mostTurn + time.Second + time.Duration(burst)*turns.every)); wait != 0 {
			t.Fatalf("after a quiet time: told to wait %d", wait)
		}
	})
}

func FuzzKnock(f *testing.F) {
	knock := append(bytes.Clone(knockHead), make([]byte, knockSize-len(knockHead))...)
	f.Add(knock)
	f.Add(knockHead)
	f.Add(answerTo(knock, func() uint16 { return later }))
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := answerTo(b, func() uint16 { return 9 })
		if answer != nil {
			if len(answer) > len(b) {
				t.Fatalf("%d bytes are answered with %d", len(b), len(answer))
			}
			if turn, ok := answerIn(answer, b[len(knockHead):][:tokenSize]); !ok || turn != 9 {
				t.Fatalf("the answer %q is not read as such", answer)
			}
		}
		answerIn(b, make([]byte, tokenSize))
	})
}
