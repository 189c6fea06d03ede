package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"unicode"
)

// What can be wrong with an activation code, seen without asking anyone.
var (
	ErrNotACode    = errors.New("this is not an activation code: one begins with \"belay1.\"; make one with: belay activation create")
	ErrDamagedCode = errors.New("the activation code is damaged, a character is missing or changed: copy it again, whole")
	ErrNewerCode   = errors.New("the activation code has a newer format than this agent knows: install the agent that belongs to the control plane")
)

const (
	activationPrefix = "belay"
	activationFormat = 1
	checksumSize     = 4
	maxCode          = 16 << 10
)

// ActivationCode is what a device needs to enrol: where, with whom and by
// which right. It is a secret and formats as "[activation code]".
type ActivationCode struct {
	Addresses []string `json:"a"` // host:port, at least one
	Pin       Pin      `json:"p"`
	ID        string   `json:"i"` // of the activation, 32 hex digits
	Secret    []byte   `json:"s"` // 32 random bytes
}

// String hides the secret.
func (ActivationCode) String() string { return "[activation code]" }

// GoString hides the secret.
func (ActivationCode) GoString() string { return "[activation code]" }

// Encode writes the code as text: "belay1." and base64url of JSON followed by
// the first four bytes of the JSON's SHA-256.
func (c ActivationCode) Encode() (string, error) {
	if err := c.validate(); err != nil {
		return "", fmt.Errorf("encode activation code: %w", err)
	}
	b, err := json.Marshal(struct {
		A []string `json:"a"`
		P Pin      `json:"p"`
		I string   `json:"i"`
		S string   `json:"s"`
	}{c.Addresses, c.Pin, c.ID, base64.RawURLEncoding.EncodeToString(c.Secret)})
	if err != nil {
		return "", fmt.Errorf("encode activation code: %w", err)
	}
	sum := sha256.Sum256(b)
	b = append(b, sum[:checksumSize]...)
	return activationPrefix + strconv.Itoa(activationFormat) + "." + base64.RawURLEncoding.EncodeToString(b), nil
}

// ParseActivationCode reads a code, ignoring white space that a terminal or a
// mail put into it. Errors: ErrNotACode, ErrDamagedCode, ErrNewerCode.
func ParseActivationCode(text string) (ActivationCode, error) {
	var c ActivationCode
	if len(text) > maxCode {
		return c, ErrNotACode
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, text)
	head, body, ok := strings.Cut(text, ".")
	digits, prefixed := strings.CutPrefix(head, activationPrefix)
	if !ok || !prefixed {
		return c, ErrNotACode
	}
	format, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || format == 0 || strconv.FormatUint(format, 10) != digits {
		return c, ErrNotACode
	}
	if format > activationFormat {
		return c, ErrNewerCode
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || len(b) <= checksumSize {
		return c, ErrDamagedCode
	}
	b, sum := b[:len(b)-checksumSize], b[len(b)-checksumSize:]
	if want := sha256.Sum256(b); !bytes.Equal(sum, want[:checksumSize]) {
		return c, ErrDamagedCode
	}
	var raw struct {
		A []string `json:"a"`
		P Pin      `json:"p"`
		I string   `json:"i"`
		S string   `json:"s"`
	}
	if err := json.Unmarshal(b, &raw); err != nil {
		return c, ErrDamagedCode
	}
	secret, err := base64.RawURLEncoding.DecodeString(raw.S)
	if err != nil {
		return c, ErrDamagedCode
	}
	c = ActivationCode{Addresses: raw.A, Pin: raw.P, ID: raw.I, Secret: secret}
	if c.validate() != nil {
		return ActivationCode{}, ErrDamagedCode
	}
	return c, nil
}

func (c ActivationCode) validate() error {
	if len(c.Addresses) == 0 {
		return errors.New("no address")
	}
	for _, a := range c.Addresses {
		if err := CheckAddress(a); err != nil {
			return err
		}
	}
	if b, err := hex.DecodeString(c.ID); err != nil || len(b) != 16 {
		return fmt.Errorf("%q is not an activation id", c.ID)
	}
	if len(c.Secret) < 16 || len(c.Secret) > 64 {
		return fmt.Errorf("a secret of %d bytes", len(c.Secret))
	}
	return nil
}

// CheckAddress tells whether s is host:port with a port that can be dialled.
func CheckAddress(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not an address: want host:port", s)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return fmt.Errorf("%q is not an address: want host:port, with a port of 1 to 65535", s)
	}
	return nil
}
