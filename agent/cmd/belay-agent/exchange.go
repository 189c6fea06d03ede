package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// enrolment is one question to a control plane: may this key be an instance?
type enrolment struct {
	code      wire.ActivationCode
	cert      tls.Certificate
	transport string // "quic", "tcp" or "auto"
	request   *wire.EnrollRequest
	retry     time.Duration // first pause before asking again
	warn      func(format string, args ...any)
}

// errUndecided means that the control plane may have taken the device.
var errUndecided = errors.New("no definite answer from the control plane")

// refusedError is the control plane's definite no.
type refusedError struct{ said *wire.Error }

func (e refusedError) Error() string { return e.said.Error() }
func (e refusedError) Unwrap() error { return e.said }

// Times of one exchange.
const (
	quicTime   = 5 * time.Second // then it is taken to be blocked
	tcpTime    = 10 * time.Second
	answerTime = 20 * time.Second
	retryCap   = 10 * time.Second
)

// ask asks until there is a definite answer, ctx ends, or nobody can be
// reached. Errors: refusedError; errUndecided when it may have been taken;
// any other means that the request never left this device. Asking again is
// harmless: the same key is the same instance.
func (e enrolment) ask(ctx context.Context) (*wire.EnrollResponse, error) {
	pause := e.retry
	sent := false
	for {
		response, err := e.askOnce(ctx)
		var no *wire.Error
		switch {
		case err == nil:
			return response, nil
		case errors.As(err, &no) && !temporary(no.Code):
			return nil, refusedError{no}
		case !errors.Is(err, errUndecided) && no == nil && !sent:
			return nil, err // nobody there: not worth waiting for
		}
		sent = true
		wait := pause
		if no != nil && no.RetryAfter > wait {
			wait = no.RetryAfter
		}
		e.warn("%v: trying again in %s", err, wait.Round(time.Millisecond))
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			if errors.Is(err, errUndecided) {
				return nil, err
			}
			return nil, fmt.Errorf("%w: %w", errUndecided, err)
		}
		pause = min(2*pause, retryCap)
	}
}

// temporary tells codes that another try may change.
func temporary(code string) bool {
	switch code {
	case wire.CodeInvalid, wire.CodeNotFound, wire.CodeExpired, wire.CodeExhausted, wire.CodeUnknownKey,
		wire.CodeDenied, wire.CodePrecondition, wire.CodeUnsupported, wire.CodeVersion:
		return false
	}
	return true
}

// askOnce tries every address, over each transport, until one takes the question.
func (e enrolment) askOnce(ctx context.Context) (*wire.EnrollResponse, error) {
	var failed []error
	for _, address := range e.code.Addresses {
		for _, transport := range transports(e.transport) {
			s, err := dial(ctx, address, transport, wire.ProtocolEnroll, e.cert, e.code.Pin)
			if err == nil {
				return e.exchange(ctx, s)
			}
			failed = append(failed, err)
			if ctx.Err() != nil || errors.Is(err, carrier.ErrWrongPin) {
				return nil, unreachable(failed)
			}
		}
	}
	return nil, unreachable(failed)
}

// unreachable says what to look at, once, below everything that was tried.
func unreachable(failed []error) error {
	err := errors.Join(failed...)
	switch {
	case errors.Is(err, carrier.ErrWrongPin):
		return fmt.Errorf("%w: this is not the control plane the activation code was made by; make a code on the one you mean", err)
	case errors.Is(err, carrier.ErrNotControlPlane):
		return fmt.Errorf("%w\ncheck the address the activation code was made for (belay-control serve --advertise)", err)
	}
	return fmt.Errorf("%w\ncheck that the control plane runs and that this network lets UDP or TCP to it through", err)
}

func transports(choice string) []string {
	if choice == "auto" {
		return []string{wire.TransportQUIC, wire.TransportTCP}
	}
	return []string{choice}
}

func dial(ctx context.Context, address, transport, protocol string, cert tls.Certificate, pin wire.Pin) (wire.Session, error) {
	limit := tcpTime
	if transport == wire.TransportQUIC {
		limit = quicTime
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return carrier.Dial(ctx, carrier.DialConfig{
		Address: address, Transport: transport, Protocol: protocol,
		Certificate: cert, Pins: []wire.Pin{pin},
	})
}

// exchange asks on a session. Whatever goes wrong from here on, the control
// plane may have taken the device.
func (e enrolment) exchange(ctx context.Context, s wire.Session) (*wire.EnrollResponse, error) {
	defer s.Close("", "")
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	response, err := e.converse(ctx, s)
	switch {
	case err != nil:
		// A side that closes with a code has answered.
		var no *wire.Error
		if ended := s.Err(); errors.As(err, &no) || errors.As(ended, &no) {
			return nil, no
		}
		return nil, fmt.Errorf("%w: %s over %s: %w", errUndecided, s.RemoteAddr(), s.Transport(), err)
	case response.GetFailure() != nil:
		return nil, response.GetFailure().Err()
	case response.GetInstanceId() == "":
		return nil, fmt.Errorf("%w: it names no instance", errUndecided)
	}
	return response, nil
}

func (e enrolment) converse(ctx context.Context, s wire.Session) (*wire.EnrollResponse, error) {
	st, err := s.OpenStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	defer st.Close()
	// The stream, not ctx, is what a blocked read or write hangs on.
	defer context.AfterFunc(ctx, func() { _ = st.SetDeadline(time.Unix(1, 0)) })()
	for _, f := range []*wire.Frame{
		{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_CONTROL}}},
		{Body: &wire.Frame_EnrollRequest{EnrollRequest: e.request}},
	} {
		if err := wire.WriteFrame(st, f); err != nil {
			return nil, fmt.Errorf("send request: %w", err)
		}
	}
	for {
		f, err := wire.ReadFrameMax(st, wire.MaxFirstFrame)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, fmt.Errorf("read answer: %w", err)
		}
		if r := f.GetEnrollResponse(); r != nil {
			return r, nil
		}
	}
}
