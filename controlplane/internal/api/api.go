// Package api serves the operator API: it tells who calls, asks whether they
// may, and translates between the API's messages and the domain.
package api

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
)

const (
	// maxRequest bounds a request; the largest is a task definition.
	maxRequest = 1 << 20
	// unaryTimeout bounds a call whose client sets no deadline of its own.
	unaryTimeout = 30 * time.Second
	// logsTimeout bounds reading a container's output.
	logsTimeout = 10 * time.Minute
	// strangerPatience is how long who has shown no token may take to send a
	// body: nobody reads it, but net/http waits for its end, for ever.
	strangerPatience = 2 * time.Second
)

// Config is what the API stands on.
type Config struct {
	Plane *controlplane.Plane
	// Token is the administrator's bearer token.
	Token  string
	Logger *slog.Logger
	// Authorize decides whether a principal may do an action to a resource;
	// nil: the administrator may do everything. Its error is the answer.
	Authorize func(p Principal, action, resource string) error
	// Stopping, when closed, ends streams: they would outlive any shutdown.
	Stopping <-chan struct{}
}

// Principal is who calls.
type Principal struct{ Name string }

// administrator is the only principal for now.
var administrator = Principal{Name: "admin"}

type server struct {
	plane     *controlplane.Plane
	log       *slog.Logger
	allow     func(p Principal, action, resource string) error
	tokenHash [sha256.Size]byte
}

var _ apiv1connect.BelayHandler = (*server)(nil)

// NewHandler returns the API, and /healthz, which answers anybody.
func NewHandler(cfg Config) http.Handler {
	s := &server{plane: cfg.Plane, log: cfg.Logger, allow: cfg.Authorize, tokenHash: sha256.Sum256([]byte(cfg.Token))}
	if s.allow == nil {
		s.allow = func(p Principal, action, _ string) error {
			if p != administrator {
				return controlplane.Errorf(controlplane.Denied, "%s may not %s", p.Name, action)
			}
			return nil
		}
	}
	mux := http.NewServeMux()
	path, handler := apiv1connect.NewBelayHandler(s,
		connect.WithInterceptors(&interceptor{log: cfg.Logger, stopping: cfg.Stopping}),
		connect.WithReadMaxBytes(maxRequest),
		connect.WithCodec(jsonCodec{"json"}),
		connect.WithCodec(jsonCodec{"json; charset=utf-8"}),
		connect.WithRecover(s.recovered),
	)
	mux.Handle(path, s.authenticate(handler))
	mux.HandleFunc("GET /healthz", s.health)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		bodyDeadline(w, r, time.Now().Add(strangerPatience))
		mux.ServeHTTP(w, r)
	})
}

// bodyDeadline bounds reading a body over HTTP/1.1; zero: it is not bounded.
// HTTP/2 needs none: there a stream ends with its handler.
func bodyDeadline(w http.ResponseWriter, r *http.Request, at time.Time) {
	if r.ProtoMajor == 1 {
		// It fails only where w is no connection's.
		_ = http.NewResponseController(w).SetReadDeadline(at)
	}
}

func (s *server) recovered(_ context.Context, spec connect.Spec, _ http.Header, what any) error {
	s.log.Error("a call panicked", "procedure", spec.Procedure, "panic", what)
	return connect.NewError(connect.CodeInternal, errors.New("internal error: see the control plane's log"))
}

func (s *server) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	if err := s.plane.Ready(ctx); err != nil {
		s.log.Warn("not healthy", "error", err)
		http.Error(w, "the store does not answer", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte("ok\n"))
}

type principalKey struct{}

// authenticate lets nothing past, not even a body, without a valid token.
func (s *server) authenticate(next http.Handler) http.Handler {
	refuse := connect.NewErrorWriter(connect.WithCodec(jsonCodec{"json"}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The longest request is a few hundred KiB: do not read more for anyone.
		r.Body = http.MaxBytesReader(w, r.Body, 4*maxRequest)
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		given := sha256.Sum256([]byte(strings.TrimSpace(token)))
		if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(given[:], s.tokenHash[:]) != 1 {
			message := "the token is not valid here: is BELAY_TOKEN the content of this control plane's admin.token?"
			if r.Header.Get("Authorization") == "" {
				message = "no token given: set BELAY_TOKEN to the content of the control plane's admin.token"
			}
			w.Header().Set("WWW-Authenticate", "Bearer")
			err := connect.NewError(connect.CodeUnauthenticated, errors.New(message))
			if refuse.IsSupported(r) {
				_ = refuse.Write(w, r, err)
			} else {
				http.Error(w, message, http.StatusUnauthorized)
			}
			return
		}
		bodyDeadline(w, r, time.Time{})
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), principalKey{}, administrator)))
	})
}

// authorize is called by every handler, before it does anything: action is
// noun:verb, resource what it would be done to ("": all, or a new one).
func (s *server) authorize(ctx context.Context, action, resource string) error {
	p, ok := ctx.Value(principalKey{}).(Principal)
	if !ok {
		return controlplane.Errorf(controlplane.Unauthenticated, "who calls is not known")
	}
	return s.allow(p, action, resource)
}

// interceptor turns errors of the domain into Connect's, message intact, and
// bounds unary calls.
type interceptor struct {
	log      *slog.Logger
	stopping <-chan struct{}
}

func (i *interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, unaryTimeout)
		defer cancel()
		answer, err := next(ctx, r)
		return answer, i.translate(r.Spec(), err)
	}
}

func (i *interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i *interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, c connect.StreamingHandlerConn) error {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		if i.stopping != nil {
			go func() {
				select {
				case <-i.stopping:
					cancel(errStopping)
				case <-ctx.Done():
				}
			}()
		}
		err := next(ctx, c)
		if context.Cause(ctx) == errStopping {
			err = errStopping // not the quiet end of a complete answer
		}
		return i.translate(c.Spec(), err)
	}
}

var errStopping error = controlplane.Errorf(controlplane.Unavailable, "the control plane is shutting down: try again")

func (i *interceptor) translate(spec connect.Spec, err error) error {
	var already *connect.Error
	if err == nil || errors.As(err, &already) {
		return err
	}
	code := connectCode(err)
	if code == connect.CodeInternal {
		i.log.Error("a call failed", "procedure", spec.Procedure, "error", err)
	}
	return connect.NewError(code, err)
}

func connectCode(err error) connect.Code {
	switch controlplane.CodeOf(err) {
	case controlplane.InvalidArgument:
		return connect.CodeInvalidArgument
	case controlplane.NotFound:
		return connect.CodeNotFound
	case controlplane.AlreadyExists:
		return connect.CodeAlreadyExists
	case controlplane.Conflict:
		return connect.CodeAborted
	case controlplane.Precondition, controlplane.Expired:
		return connect.CodeFailedPrecondition
	case controlplane.Exhausted:
		return connect.CodeResourceExhausted
	case controlplane.Unauthenticated:
		return connect.CodeUnauthenticated
	case controlplane.Denied:
		return connect.CodePermissionDenied
	case controlplane.Unavailable:
		return connect.CodeUnavailable
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		return connect.CodeCanceled
	}
	return connect.CodeInternal
}
