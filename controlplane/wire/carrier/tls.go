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

// serverTLS chooses by ALPN: tunnels get the pinned leaf and are asked for
// their key, everything else gets the API's certificate and is asked for
// nothing. Without api there is only the tunnel.
func serverTLS(tunnel tls.Certificate, api *tls.Config) *tls.Config {
	forTunnel := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             tunnelProtocols,
		Certificates:           []tls.Certificate{tunnel},
		ClientAuth:             tls.RequireAnyClientCert, // possession of the key is proven, the rest is ours to check
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("no client certificate")
			}
			return nil
		},
	}
	if api == nil {
		return forTunnel
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			for _, p := range h.SupportedProtos {
				if slices.Contains(tunnelProtocols, p) {
					return forTunnel, nil
				}
			}
			return api, nil
		},
	}
}

func apiTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   apiProtocols,
		Certificates: []tls.Certificate{cert},
	}
}
