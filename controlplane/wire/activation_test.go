package wire

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func sampleCode() ActivationCode {
	return ActivationCode{
		Addresses: []string{"control.example:7443", "192.0.2.7:443", "[2001:db8::1]:7443"},
		Pin:       Pin{1, 2, 3},
		ID:        "00112233445566778899aabbccddeeff",
		Secret:    []byte("0123456789abcdef0123456789abcdef"),
	}
}

// The format is frozen: codes made by version 1 must work for ever.
const frozenCode = "belay1.eyJhIjpbImNvbnRyb2wuZXhhbXBsZTo3NDQzIiwiMTkyLjAuMi43OjQ0MyIsIlsyMDAxOmRiODo6MV06NzQ0MyJdLCJwIjoiQVFJREFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQSIsImkiOiIwMDExMjIzMzQ0NTU2Njc3ODg5OWFhYmJjY2RkZWVmZiIsInMiOiJNREV5TXpRMU5qYzRPV0ZpWTJSbFpqQXhNak0wTlRZM09EbGhZbU5rWldZIn11G9bc"

func TestActivationCodeRoundTrip(t *testing.T) {
	want := sampleCode()
	text, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if text != frozenCode {
		t.Errorf("the format changed:\n%s", text)
	}
	wrapped := " " + text[:40] + "\n  " + text[40:] + "\r\n"
	for _, in := range []string{text, wrapped} {
		got, err := ParseActivationCode(in)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	for _, s := range []string{want.String(), fmt.Sprintf("%v %+v %#v", want, want, want)} {
		if strings.Contains(s, "0123") || strings.Contains(s, "48, 49") {
			t.Errorf("the secret shows in %q", s)
		}
	}
}

func TestActivationCodeErrors(t *testing.T) {
	good, err := sampleCode().Encode()
	if err != nil {
		t.Fatal(err)
	}
	seal := func(json string) string {
		sum := sha256.Sum256([]byte(json))
		return "belay1." + base64.RawURLEncoding.EncodeToString(append([]byte(json), sum[:4]...))
	}
	tests := []struct {
		name, in string
		want     error
	}{
		{"empty", "", ErrNotACode},
		{"a token", "abcdef", ErrNotACode},
		{"a JWT", "eyJh.eyJh.abc", ErrNotACode},
		{"format 0", "belay0.abc", ErrNotACode},
		{"format 01", "belay01.abc", ErrNotACode},
		{"a novel", strings.Repeat("belay1.", 5000), ErrNotACode},
		{"a later format", "belay2." + good[7:], ErrNewerCode},
		{"nothing after the dot", "belay1.", ErrDamagedCode},
		{"one letter missing", good[:len(good)-1], ErrDamagedCode},
		{"first letters missing", "belay1." + good[9:], ErrDamagedCode},
		{"sealed, not JSON", seal("hello"), ErrDamagedCode},
		{"sealed, no address", seal(`{"a":[],"p":"` + Pin{}.String() + `","i":"00112233445566778899aabbccddeeff","s":"MDEyMzQ1Njc4OWFiY2RlZg"}`), ErrDamagedCode},
		{"sealed, bad address", seal(`{"a":["x"],"p":"` + Pin{}.String() + `","i":"00112233445566778899aabbccddeeff","s":"MDEyMzQ1Njc4OWFiY2RlZg"}`), ErrDamagedCode},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := ParseActivationCode(tt.in); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	for i := 7; i < len(good); i++ {
		other := byte('A')
		if good[i] == other {
			other = 'B'
		}
		in := good[:i] + string(other) + good[i+1:]
		if _, err := ParseActivationCode(in); !errors.Is(err, ErrDamagedCode) {
			t.Fatalf("letter %d changed: %v", i, err)
		}
	}
	// What a later control plane of the same format adds is ignored.
	later := seal(`{"a":["a:1"],"p":"` + Pin{}.String() + `","i":"00112233445566778899aabbccddeeff","s":"MDEyMzQ1Njc4OWFiY2RlZg","z":1}`)
	if _, err := ParseActivationCode(later); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
}

func TestCheckAddress(t *testing.T) {
	for in, ok := range map[string]bool{
		"a:1": true, "1.2.3.4:7443": true, "[::1]:65535": true,
		"": false, "a": false, ":1": false, "a:0": false, "a:65536": false, "a:http": false, "::1:5": false, "http://a:1": false,
	} {
		if err := CheckAddress(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzParseActivationCode(f *testing.F) {
	good, err := sampleCode().Encode()
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{good, good[:30], "belay2.AAAA", "belay1.", "", "belay1.AAAAAAAA"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		c, err := ParseActivationCode(in)
		if err != nil {
			if !errors.Is(err, ErrNotACode) && !errors.Is(err, ErrDamagedCode) && !errors.Is(err, ErrNewerCode) {
				t.Fatalf("an error without a sort: %v", err)
			}
			return
		}
		text, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseActivationCode(text)
		if err != nil || !cmp.Equal(c, again) {
			t.Fatalf("changed on its second way: %v", err)
		}
	})
}
