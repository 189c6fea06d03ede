package carrier

import (
	"bytes"
	"crypto/x509"
	"testing"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

func TestKeysAndCASurviveTheirFiles(t *testing.T) {
	ca, err := NewCA()
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseCA(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	if again.Pin() != ca.Pin() {
		t.Error("the pin changed")
	}
	a, err := ca.Secret("one")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := again.Secret("one"); a != b {
		t.Error("a secret of the same key changed")
	}
	if b, _ := again.Secret("two"); a == b {
		t.Error("two purposes share a secret")
	}

	leaf, err := again.Leaf([]string{"control.example", "192.0.2.7"})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	for _, name := range []string{"control.example", "192.0.2.7"} {
		for _, year := range []int{1970, 2026, 2049, 2051, 9000} { // the clock of who asks, whenever the CA was made
			at := time.Date(year, 1, 1, 0, 0, 1, 0, time.UTC)
			if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: at}); err != nil {
				t.Errorf("%s in %d: %v", name, year, err)
			}
		}
	}

	other, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	text, err := EncodeKey(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCA(cert, text); err == nil {
		t.Error("a CA with somebody else's key")
	}
	parsed, err := ParseKey(text)
	if err != nil {
		t.Fatal(err)
	}
	one, err := SelfSigned(other)
	if err != nil {
		t.Fatal(err)
	}
	two, err := SelfSigned(parsed)
	if err != nil {
		t.Fatal(err)
	}
	if wire.Fingerprint(one.Leaf) != wire.Fingerprint(two.Leaf) {
		t.Error("the same key has two fingerprints")
	}
	for _, bad := range [][]byte{nil, []byte("x"), cert, bytes.Replace(text, []byte("M"), []byte("N"), 1)} {
		if _, err := ParseKey(bad); err == nil {
			t.Errorf("parsed %q", bad)
		}
	}
}
