package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	// maxRequests is how many questions are answered at once.
	maxRequests = 16
	// openTimeout is how long an opened stream may take to say what it is.
	openTimeout = 10 * time.Second
	// chunkSize is how output is cut: small enough that a stop is quick.
	chunkSize = 32 << 10
)

// answerRequests serves the streams that the control plane opens.
func (s *session) answerRequests(ctx context.Context) error {
	busy, unwatch := s.link.mind("session requests", sessionDeadline)
	defer unwatch()
	places := make(chan struct{}, maxRequests)
	for {
		busy(false)
		stream, err := s.conn.AcceptStream(ctx)
		busy(true)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return ended(s.conn, err)
		}
		select {
		case places <- struct{}{}:
			s.answers.Add(1)
			go func() {
				defer func() { <-places; s.answers.Add(-1) }()
				s.answer(ctx, stream)
			}()
		default:
			go s.turnAway(stream)
		}
	}
}

// turnAway says that there are too many; it costs no place.
func (s *session) turnAway(stream wire.Stream) {
	defer stream.Close()
	_ = stream.SetDeadline(time.Now().Add(openTimeout))
	done(stream, wire.Failf(wire.CodeOverloaded, "the device answers %d requests already", maxRequests))
}

func (s *session) answer(ctx context.Context, stream wire.Stream) {
	defer stream.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Deadlines wake what is blocked, on either carrier.
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Now()) })()
	_ = stream.SetReadDeadline(time.Now().Add(openTimeout))
	f, err := wire.Await(stream, func(f *wire.Frame) bool { return f.GetOpen() != nil })
	if err != nil || f.GetOpen().Type != wire.StreamType_STREAM_TYPE_REQUEST {
		return
	}
	f, err = wire.Await(stream, func(f *wire.Frame) bool { return f.GetRequest() != nil })
	if err != nil {
		return
	}
	_ = stream.SetReadDeadline(time.Time{})
	go func() {
		// Nothing more is to come: the asker's direction ending, or anything
		// but silence in it, means that the answer is no longer wanted.
		_, _ = io.Copy(io.Discard, io.LimitReader(stream, chunkSize))
		cancel()
	}()
	var failure *wire.Failure
	switch q := f.GetRequest().Body.(type) {
	case *wire.Request_Logs:
		failure = s.logs(ctx, stream, q.Logs)
	default:
		failure = wire.Failf(wire.CodeUnsupported, "this agent does not know the request: update it")
	}
	done(stream, failure)
}

func (s *session) logs(ctx context.Context, stream wire.Stream, q *wire.LogsRequest) *wire.Failure {
	err := s.link.down.Logs(ctx, q, func(name string, data []byte) error {
		for len(data) > 0 {
			n := min(len(data), chunkSize)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			_ = stream.SetWriteDeadline(time.Now().Add(writeTimeout))
			chunk := &wire.Chunk{Stream: name, Data: data[:n]}
			if err := wire.WriteFrame(stream, &wire.Frame{Body: &wire.Frame_Chunk{Chunk: chunk}}); err != nil {
				return fmt.Errorf("send output: %w", err)
			}
			data = data[n:]
		}
		return nil
	})
	return failureOf(err)
}

func done(stream wire.Stream, failure *wire.Failure) {
	_ = stream.SetWriteDeadline(time.Now().Add(openTimeout))
	if wire.WriteFrame(stream, &wire.Frame{Body: &wire.Frame_Done{Done: &wire.Done{Failure: failure}}}) == nil {
		_ = stream.CloseWrite()
	}
}

// failureOf puts an error of the agent or a plugin into the words of the wire.
func failureOf(err error) *wire.Failure {
	if err == nil {
		return nil
	}
	code := wire.CodeInternal
	for kind, c := range map[sdk.ErrorKind]string{
		sdk.Invalid: wire.CodeInvalid, sdk.NotFound: wire.CodeNotFound, sdk.Unsupported: wire.CodeUnsupported,
		sdk.Unavailable: wire.CodeUnavailable, sdk.Deadline: wire.CodeUnavailable, sdk.Conflict: wire.CodePrecondition,
		sdk.Exhausted: wire.CodeExhausted,
	} {
		if errors.Is(err, kind) {
			code = c
		}
	}
	var e *wire.Error
	if errors.As(err, &e) {
		code = e.Code
	}
	return wire.Failf(code, "%s", err)
}
