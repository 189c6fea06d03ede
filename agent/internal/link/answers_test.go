package link

import (
	"net"
	"testing"

	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// A port that takes connections and says nothing answers: that the tunnel does
// not come up there is the tunnel's trouble.
func TestAnswers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	key, err := carrier.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	l, err := New(Config{InstanceID: "i", Key: key, Addresses: []string{"127.0.0.1:1", ln.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	if !l.Answers(t.Context()) {
		t.Error("nobody answered")
	}
	ln.Close()
	if l.Answers(t.Context()) {
		t.Error("somebody answered")
	}
}
