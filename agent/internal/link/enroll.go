package link

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// enrollTimeout bounds one try at one address over one transport, once it is
// known to answer.
const enrollTimeout = 40 * time.Second

// EnrollConfig is one enrolment.
type EnrollConfig struct {
	Code      string        // the activation code, as typed
	Key       crypto.Signer // the device's, already kept
	Transport string        // TransportAuto (default), "quic" or "tcp"
	Proxy     *carrier.Proxy

	HashedMachineID string
	AgentVersion    string
	Hostname        string
	Facts           *wire.Facts
}

// Enrollment is what enrolling gave: to be kept with the key.
type Enrollment struct {
	InstanceID string
	Cluster    string
	Pin        wire.Pin
	Addresses  []string // of the control plane, the one that answered first
	Already    bool     // this key was enrolled before
	Transport  string   // that worked
}

// Reasons an enrolment failed that a caller may want to tell apart, beside
// those of package carrier and the errors of wire.ParseActivationCode. A
// refusal also carries its wire code.
var (
	ErrRefused     = errors.New("the control plane refused the enrolment")
	ErrUnreachable = errors.New("no control plane could be reached")
	// ErrUndecided: the request was sent and no answer came. Asking again with
	// the same key settles it; another key might be a second instance.
	ErrUndecided = errors.New("the control plane was asked, but its answer was lost")
)

// Enroll asks the control plane named in the code to make this device an
// instance. It tries each address over QUIC, then TCP, and stops at the first
// that decides. A device whose answer was lost enrols again with the same key
// and becomes the same instance.
func Enroll(ctx context.Context, cfg EnrollConfig) (Enrollment, error) {
	code, err := wire.ParseActivationCode(cfg.Code)
	if err != nil {
		return Enrollment{}, err
	}
	if cfg.Transport == "" {
		cfg.Transport = TransportAuto
	}
	if err := CheckTransport(cfg.Transport); err != nil {
		return Enrollment{}, err
	}
	cert, err := carrier.SelfSigned(cfg.Key)
	if err != nil {
		return Enrollment{}, err
	}
	resolver := carrier.NewResolver(nil, nil)
	var failed []error
	for _, address := range code.Addresses {
		for _, try := range plan(cfg.Transport) {
			dialing, cancel := context.WithTimeout(ctx, try.within)
			s, err := carrier.Dial(dialing, carrier.DialConfig{
				Address: address, Transport: try.transport, Protocol: wire.ProtocolEnroll,
				Certificate: cert, Pins: []wire.Pin{code.Pin}, Proxy: cfg.Proxy, Resolver: resolver,
			})
			cancel()
			if err != nil {
				failed = append(failed, err)
				if ctx.Err() != nil {
					return Enrollment{}, enrollFailure(failed)
				}
				if errors.Is(err, carrier.ErrWrongPin) {
					break
				}
				continue
			}
			answer, err := enrollOver(ctx, s, cfg, code)
			s.Close("", "")
			if err != nil {
				// Whether it took effect is unknown; asking again is safe.
				failed = append(failed, fmt.Errorf("enrol at %s over %s: %w: %w", address, try.transport, ErrUndecided, err))
				continue
			}
			return accept(answer, code, address, try.transport)
		}
	}
	return Enrollment{}, enrollFailure(failed)
}

// attempt is one transport and how long a dial over it may take.
type attempt struct {
	transport string
	within    time.Duration
}

// plan tries one after the other, unlike the link: an enrolment may take
// effect, and only one must.
func plan(transport string) []attempt {
	if transport == TransportAuto {
		return []attempt{{wire.TransportQUIC, quicHeadStart}, {wire.TransportTCP, dialTimeout}}
	}
	return []attempt{{transport, dialTimeout}}
}

func enrollOver(ctx context.Context, s wire.Session, cfg EnrollConfig, code wire.ActivationCode) (*wire.EnrollResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, enrollTimeout)
	defer cancel()
	stream, err := s.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Now()) })()
	if err := writeFrames(stream,
		&wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_CONTROL}}},
		&wire.Frame{Body: &wire.Frame_EnrollRequest{EnrollRequest: &wire.EnrollRequest{
			Version:         wire.Version,
			ActivationId:    code.ID,
			Secret:          code.Secret,
			HashedMachineId: cfg.HashedMachineID,
			AgentVersion:    cfg.AgentVersion,
			Hostname:        cfg.Hostname,
			Facts:           cfg.Facts,
		}}},
	); err != nil {
		return nil, ended(s, err)
	}
	f, err := wire.Await(stream, func(f *wire.Frame) bool { return f.GetEnrollResponse() != nil })
	switch {
	case err == nil:
		return f.GetEnrollResponse(), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer to the enrolment: %w", ctx.Err())
	case errors.Is(err, io.EOF):
		return nil, errors.New("the control plane closed the session without an answer")
	}
	return nil, ended(s, err)
}

func accept(answer *wire.EnrollResponse, code wire.ActivationCode, address, transport string) (Enrollment, error) {
	if err := answer.GetFailure().Err(); err != nil {
		return Enrollment{}, refusal(err)
	}
	if answer.InstanceId == "" {
		return Enrollment{}, fmt.Errorf("enrol: %w: it names no instance", ErrUndecided)
	}
	e := Enrollment{
		InstanceID: answer.InstanceId, Cluster: answer.Cluster, Pin: code.Pin,
		Already: answer.AlreadyEnrolled, Transport: transport, Addresses: []string{address},
	}
	for _, list := range [][]string{answer.Addresses, code.Addresses} {
		for _, a := range list {
			if wire.CheckAddress(a) == nil && !slices.Contains(e.Addresses, a) {
				e.Addresses = append(e.Addresses, a)
			}
		}
	}
	return e, nil
}

// refusal says in one sentence what each code means for whoever types.
func refusal(err error) error {
	const anew = "make a new one with: belay activation create"
	what := map[string]string{
		wire.CodeNotFound:     "the activation does not exist, or was deleted: " + anew,
		wire.CodeUnknownKey:   "the activation code has a wrong secret: copy it again, or " + anew,
		wire.CodeExpired:      "the activation has expired: " + anew,
		wire.CodeExhausted:    "the activation is used up, as many devices as it allows have enrolled: " + anew,
		wire.CodePrecondition: "this device's key belongs to an instance that was deregistered: it needs a new one",
		wire.CodeVersion:      "agent and control plane have no protocol version in common: update one of them",
		wire.CodeOverloaded:   "the control plane is busy: try again in a minute",
		wire.CodeUnavailable:  "the control plane cannot enrol anyone just now: try again in a minute",
	}[wire.CodeOf(err)]
	if what == "" {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return &decision{what, err}
}

type decision struct {
	what string
	err  error
}

func (r *decision) Error() string   { return r.what }
func (r *decision) Unwrap() []error { return []error{ErrRefused, r.err} }

// enrollFailure is about no address having decided.
func enrollFailure(failed []error) error {
	err := joined(failed)
	switch {
	case errors.Is(err, ErrUndecided):
		return err
	case errors.Is(err, carrier.ErrWrongPin):
		return fmt.Errorf("enrol: the server that answered has another key than the one in the activation code: "+
			"the code belongs to another control plane, or something stands between: %w", err)
	case errors.Is(err, carrier.ErrNotControlPlane):
		return fmt.Errorf("enrol: check the address that the control plane advertises: %w", err)
	}
	return fmt.Errorf("enrol: %w, check the network and that port 7443 or the one named is open for UDP or TCP: %w", ErrUnreachable, err)
}
