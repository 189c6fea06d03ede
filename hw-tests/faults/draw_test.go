package faults

import (
	"reflect"
	"testing"
)

// TestDeal: the draw depends on seed and run alone, and comes to every pair of
// kind and phase as often as to any other.
func TestDeal(t *testing.T) {
	const runs = 500
	hits := map[card]int{}
	for n := range runs {
		hand := deal(1, n)
		if len(hand) < 3 || len(hand) > 8 {
			t.Fatalf("run %d gets %d faults", n, len(hand))
		}
		for _, c := range hand {
			hits[c]++
		}
	}
	least, most := runs, 0
	for k := range kinds {
		for _, p := range phases {
			n := hits[card{k, p}]
			least, most = min(least, n), max(most, n)
		}
	}
	if least < 19 || most > least+1 {
		t.Errorf("pairs come up %d to %d times in %d runs", least, most, runs)
	}
	if !reflect.DeepEqual(deal(1, 77), deal(1, 77)) || reflect.DeepEqual(deal(1, 77), deal(2, 77)) {
		t.Error("the draw does not follow the seed")
	}
}

func TestFate(t *testing.T) {
	packet := func(protocol, port byte) []byte {
		p := make([]byte, 28)
		p[0], p[9], p[23] = 0x45, protocol, port
		return p
	}
	const udp, tcp = 17, 6
	for _, c := range []struct {
		name   string
		shape  shape
		packet []byte
		copies int
	}{
		{"nothing", shape{}, packet(udp, 99), 1},
		{"cut", shape{cut: true}, packet(tcp, 99), 0},
		{"UDP blocked", shape{udp: true}, packet(udp, 99), 0},
		{"UDP blocked, TCP", shape{udp: true}, packet(tcp, 99), 1},
		{"UDP blocked, a name", shape{udp: true}, packet(udp, 53), 1},
		{"TCP blocked", shape{tcp: true}, packet(tcp, 99), 0},
		{"all lost", shape{loss: 1}, packet(tcp, 99), 0},
		{"all twice", shape{duplicate: 1}, packet(tcp, 99), 2},
		{"not IP", shape{udp: true}, []byte{1}, 1},
	} {
		if copies, _ := fate(c.shape, c.packet); copies != c.copies {
			t.Errorf("%s: %d copies, want %d", c.name, copies, c.copies)
		}
	}
}
