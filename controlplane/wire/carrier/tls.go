package carrier

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/belay-edge/belay/controlplane/wire"
)

var (
	tunnelProtocols = []string{wire.ProtocolTunnel, wire.ProtocolEnroll}
	apiProtocols    = []string{"h2", "http/1.1"}
)

// clientTLS is the agent's side. The standard checks are off because they ask
// for names and a clock; VerifyConnection, which unlike VerifyPeerCertificate
// also runs on resumption, looks for the pinned key instead.
func clientTLS(cert tls.Certificate, pins []wire.Pin, protocol, host string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ServerName:             host,
		NextProtos:             []string{protocol},
		Certificates:           []tls.Certificate{cert},
		InsecureSkipVerify:     true, //nolint:gosec // replaced by VerifyConnection
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if s.NegotiatedProtocol != protocol {
				return ErrNotControlPlane
			}
			return checkPin(s.PeerCertificates, pins)
		},
	}
}

// checkPin accepts a server certificate signed by a CA, in the chain that was
// presented, whose key is pinned. Validity times and names are not looked at.
func checkPin(chain []*x509.Certificate, pins []wire.Pin) error {
	if len(chain) == 0 {
		return ErrWrongPin
	}
	leaf := chain[0]
	for _, ca := range chain[1:] {
		if !slices.Contains(pins, wire.PinOf(ca)) {
			continue
		}
		if err := leaf.CheckSignatureFrom(ca); err != nil {
			return fmt.Errorf("%w: %w", ErrWrongPin, err)
		}
		if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
			return fmt.Errorf("%w: its certificate is not one for servers", ErrWrongPin)
		}
		return nil
	}
	return ErrWrongPin
}

// tunnelTLS is the server's side of tunnels: they get the pinned leaf and are
// asked for their key.
func tunnelTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             tunnelProtocols,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAnyClientCert, // possession of the key is proven, the rest is ours to check
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("no client certificate")
			}
			return nil
		},
	}
}

// forTunnel tells by ALPN a tunnel from everything else, which is the API's: it
// gets the API's certificate and is asked for nothing.
func forTunnel(h *tls.ClientHelloInfo) bool {
	return slices.ContainsFunc(h.SupportedProtos, func(p string) bool { return slices.Contains(tunnelProtocols, p) })
}

func apiTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   apiProtocols,
		Certificates: []tls.Certificate{cert},
	}
}
