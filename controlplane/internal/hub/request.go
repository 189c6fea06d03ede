package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// Logs implements controlplane.Tunnels.
func (h *Hub) Logs(ctx context.Context, instance string, r *wire.LogsRequest, chunk func(*wire.Chunk) error) error {
	return h.ask(ctx, instance, &wire.Request{Body: &wire.Request_Logs{Logs: r}}, chunk)
}

// ask opens a request stream to a device and passes its answer on.
func (h *Hub) ask(ctx context.Context, instance string, q *wire.Request, chunk func(*wire.Chunk) error) error {
	begun := false
	counted := func(c *wire.Chunk) error {
		begun = true
		return chunk(c)
	}
	for try := 0; ; try++ {
		h.mu.Lock()
		s, ok := h.sessions[instance]
		h.mu.Unlock()
		if !ok {
			return controlplane.Errorf(controlplane.Unavailable, "instance %s is not connected: its output can be read once it is back", instance)
		}
		err := s.askOnce(ctx, q, counted)
		// A device that moved to another session just then is there.
		if err == nil || begun || ctx.Err() != nil || try == 2 || !s.draining() {
			return err
		}
	}
}

func (s *session) askOnce(ctx context.Context, q *wire.Request, chunk func(*wire.Chunk) error) error {
	instance := s.instance
	select {
	case s.requests <- struct{}{}:
		defer func() { <-s.requests }()
	default:
		return controlplane.Errorf(controlplane.Exhausted, "instance %s is answering %d requests already: try again", instance, maxRequests)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.open, func() { cancel(errGone) })()
	err := s.ask(ctx, q, chunk)
	switch cause := context.Cause(ctx); {
	case err == nil:
		return nil
	case errors.Is(cause, errGone):
		return controlplane.Errorf(controlplane.Unavailable, "instance %s disconnected while it answered: try again", instance)
	case ctx.Err() != nil:
		return cause
	}
	return err
}

var errGone = errors.New("the session ended")

func (s *session) ask(ctx context.Context, q *wire.Request, chunk func(*wire.Chunk) error) error {
	opening, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	stream, err := s.wire.OpenStream(opening)
	if err != nil {
		return s.broken(err)
	}
	defer stream.Close()
	// Deadlines wake a blocked read on either carrier; closing does not.
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Now()) })()
	_ = stream.SetWriteDeadline(time.Now().Add(writeTimeout))
	b, err := wire.AppendFrame(nil, &wire.Frame{Body: &wire.Frame_Open{Open: &wire.Open{Type: wire.StreamType_STREAM_TYPE_REQUEST}}})
	if err == nil {
		b, err = wire.AppendFrame(b, &wire.Frame{Body: &wire.Frame_Request{Request: q}})
	}
	if err != nil {
		return controlplane.Errorf(controlplane.InvalidArgument, "ask instance %s: %w", s.instance, err)
	}
	if _, err := stream.Write(b); err != nil {
		return s.broken(err)
	}
	for patience := answerTimeout; ; patience = chunkTimeout {
		_ = stream.SetReadDeadline(time.Now().Add(patience))
		if err := ctx.Err(); err != nil {
			return err
		}
		f, err := wire.ReadFrame(stream)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return s.broken(err)
		}
		switch b := f.Body.(type) {
		case *wire.Frame_Chunk:
			if err := chunk(b.Chunk); err != nil {
				return err
			}
		case *wire.Frame_Done:
			return answerError(b.Done.GetFailure())
		}
	}
}

func (s *session) broken(err error) error {
	return controlplane.Errorf(controlplane.Unavailable, "instance %s did not answer to the end: %w", s.instance, err)
}

// answerError puts what a device said into the words of the domain.
func answerError(f *wire.Failure) error {
	if f == nil {
		return nil
	}
	code := controlplane.Unavailable
	switch f.Code {
	case wire.CodeInvalid, wire.CodeNotFound, wire.CodeDenied, wire.CodePrecondition:
		code = controlplane.Code(f.Code)
	case wire.CodeUnsupported:
		code = controlplane.Precondition
	case wire.CodeExhausted, wire.CodeOverloaded:
		code = controlplane.Exhausted
	}
	return &controlplane.Error{Code: code, Message: fmt.Sprintf("the device says: %s", f.Message), Err: f.Err()}
}
