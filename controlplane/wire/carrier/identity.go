package carrier

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

const (
	keyBlock  = "PRIVATE KEY"
	certBlock = "CERTIFICATE"
)

// Certificates are trusted for their keys, and a leaf's key lives no longer than
// its process: dates would only keep out those whose clock, or that of the
// machine a CA was made on, was not set. The latter date is RFC 5280's, 4.1.2.5,
// for "no well-defined expiration".
var always, forEver = time.Unix(0, 0), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// NewKey makes a private key: ECDSA on P-256, which every board can do.
func NewKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return key, nil
}

// EncodeKey writes a private key as PEM (PKCS #8). It belongs in a file of
// mode 0600 and nowhere else.
func EncodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}

// ParseKey reads what EncodeKey wrote.
func ParseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != keyBlock {
		return nil, fmt.Errorf("read key: no PEM block of type %q in it", keyBlock)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("read key: a %T cannot sign", parsed)
	}
	return key, nil
}

// SelfSigned wraps a device's key in the certificate that TLS wants around it.
// Nothing but the key in it means anything.
func SelfSigned(key crypto.Signer) (tls.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "belay device"},
		NotBefore:    always,
		NotAfter:     forEver,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign the device's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign the device's certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// CA is a control plane's certificate authority.
type CA struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
}

// NewCA makes a CA. Its key is what devices pin, so it has to be kept.
func NewCA() (*CA, error) {
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Belay control plane CA"},
		NotBefore:             always,
		NotAfter:              forEver,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign the CA certificate: %w", err)
	}
	return &CA{Certificate: cert, Key: key}, nil
}

// Encode writes certificate and key as PEM; the key belongs in a file of mode
// 0600.
func (ca *CA) Encode() (cert, key []byte, err error) {
	key, err = EncodeKey(ca.Key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: certBlock, Bytes: ca.Certificate.Raw}), key, nil
}

// ParseCA reads what Encode wrote.
func ParseCA(cert, key []byte) (*CA, error) {
	block, _ := pem.Decode(cert)
	if block == nil || block.Type != certBlock {
		return nil, errors.New("read CA certificate: no PEM certificate in it")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read CA certificate: %w", err)
	}
	if !c.IsCA {
		return nil, errors.New("read CA certificate: it is not one of a CA")
	}
	k, err := ParseKey(key)
	if err != nil {
		return nil, fmt.Errorf("read CA key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		return nil, fmt.Errorf("read CA key: %w", err)
	}
	if !bytes.Equal(spki, c.RawSubjectPublicKeyInfo) {
		return nil, errors.New("read CA: certificate and key do not belong together")
	}
	return &CA{Certificate: c, Key: k}, nil
}

// Pin is what devices know the CA by.
func (ca *CA) Pin() wire.Pin { return wire.PinOf(ca.Certificate) }

// Leaf makes a new key and a server certificate over it, for these host names
// and IP addresses, with the CA in its chain.
func (ca *CA) Leaf(names []string) (tls.Certificate, error) { return ca.leaf(names, always, forEver) }

func (ca *CA) leaf(names []string, from, to time.Time) (tls.Certificate, error) {
	key, err := NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := newSerial()
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Belay control plane"},
		NotBefore:             from,
		NotAfter:              to,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Certificate, key.Public(), ca.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign a server certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign a server certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der, ca.Certificate.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// Secret derives 32 bytes from the CA's key that stay the same for as long as
// the key does, one value for each purpose.
func (ca *CA) Secret(purpose string) ([32]byte, error) {
	var out [32]byte
	der, err := x509.MarshalPKCS8PrivateKey(ca.Key)
	if err != nil {
		return out, fmt.Errorf("derive a secret: %w", err)
	}
	b, err := hkdf.Key(sha256.New, der, nil, "belay "+purpose, len(out))
	if err != nil {
		return out, fmt.Errorf("derive a secret: %w", err)
	}
	return [32]byte(b), nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("choose a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
