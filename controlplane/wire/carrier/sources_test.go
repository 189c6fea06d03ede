package carrier

import (
	"net"
	"testing"
)

func TestSourcesCountByAddress(t *testing.T) {
	s := NewSources(2)
	tcp := func(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }
	free, ok := s.Take(tcp("192.0.2.1", 1))
	if !ok {
		t.Fatal("the first was refused")
	}
	for _, tt := range []struct {
		from net.Addr
		want bool
	}{
		{tcp("192.0.2.1", 2), true},
		{tcp("192.0.2.1", 3), false},
		{tcp("::ffff:192.0.2.1", 4), false},
		{tcp("192.0.2.2", 1), true},
		{tcp("2001:db8:0:1::1", 1), true},
		{tcp("2001:db8:0:1:ffff::2", 1), true},
		{tcp("2001:db8:0:1::3", 1), false},
		{tcp("2001:db8:0:2::3", 1), true},
		{&net.UnixAddr{Name: "x"}, true},
	} {
		if _, ok := s.Take(tt.from); ok != tt.want {
			t.Errorf("%s: %t, want %t", tt.from, ok, tt.want)
		}
	}
	free()
	free() // a second time changes nothing
	if _, ok := s.Take(tcp("192.0.2.1", 9)); !ok {
		t.Error("a place given back was not free")
	}
	if _, ok := s.Take(tcp("192.0.2.1", 10)); ok {
		t.Error("a place given back twice was free twice")
	}
}
