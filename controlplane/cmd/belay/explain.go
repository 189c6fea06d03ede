package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"

	"connectrpc.com/connect"
)

// explain says in words what went wrong with a call and what to do about it.
func (c *cli) explain(err error) string {
	if c.conn == nil {
		return err.Error()
	}
	addr := c.conn.addr
	var dns *net.DNSError
	switch {
	case isTLSProblem(err), errors.Is(err, errRedirect):
		return c.explainTLS(err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("cannot reach the control plane: connection refused. Is belay-control running at %s?", addr)
	case errors.As(err, &dns):
		return fmt.Sprintf("cannot reach the control plane at %s: no such host as %q (%s)", addr, dns.Name, dns.Err)
	case errors.Is(err, context.DeadlineExceeded), connect.CodeOf(err) == connect.CodeDeadlineExceeded:
		return fmt.Sprintf("no answer from %s within %s; is it a control plane, and can it be reached from here? --timeout waits longer", addr, c.flags.timeout)
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err.Error()
	}
	switch {
	case !connect.IsWireError(ce) && (ce.Code() == connect.CodeUnavailable || broken(err)):
		return fmt.Sprintf("cannot reach the control plane at %s: %s", addr, trimTransport(ce.Message()))
	case !connect.IsWireError(ce) && ce.Code() != connect.CodeUnauthenticated:
		return fmt.Sprintf("%s does not answer as a control plane does (%s); is the address right?", addr, ce.Message())
	case ce.Code() == connect.CodeUnauthenticated:
		hint := ""
		if !strings.Contains(ce.Message(), "admin.token") {
			hint = "; BELAY_TOKEN or --token-file must hold the content of admin.token of this control plane"
		}
		return fmt.Sprintf("%s refused the API token: %s%s", addr, ce.Message(), hint)
	case ce.Code() == connect.CodePermissionDenied:
		return "not allowed: " + ce.Message()
	case ce.Code() == connect.CodeUnimplemented:
		return fmt.Sprintf("%s does not know this call (%s); is it a control plane, and as new as this belay?", addr, ce.Message())
	}
	return ce.Message()
}

// trimTransport drops the method and URL that Go's client puts before causes.
func trimTransport(s string) string {
	if _, after, ok := strings.Cut(s, `": `); ok {
		return after
	}
	return s
}

func isTLSProblem(err error) bool {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var verify *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	return errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &invalid) || errors.As(err, &verify) ||
		errors.As(err, &record) || errors.As(err, &alert) ||
		strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") ||
		strings.Contains(err.Error(), "first record does not look like a TLS handshake") ||
		strings.Contains(err.Error(), "remote error: tls:")
}

func (c *cli) explainTLS(err error) string {
	addr := c.conn.addr
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown) && c.conn.ca == nil:
		return fmt.Sprintf("the certificate of %s is signed by none of this system's CAs; set BELAY_CA (or --ca) to the control plane's ca.pem", addr)
	case errors.As(err, &unknown):
		return fmt.Sprintf("the certificate of %s is not signed by the CA in %s; is it this control plane's ca.pem?", addr, c.conn.caWas)
	case errors.As(err, &host):
		return fmt.Sprintf("the certificate of %s is for another name (%s); start belay-control with --advertise %s", addr, host.Error(), addr)
	case errors.As(err, &invalid):
		return fmt.Sprintf("the certificate of %s is not valid: %s", addr, invalid.Error())
	}
	return fmt.Sprintf("%s is not a control plane: it does not speak TLS as one does (%s)", addr, trimTransport(err.Error()))
}
