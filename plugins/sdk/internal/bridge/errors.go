package bridge

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/internal/pluginpb"
)

// kindCodes pairs each kind with the gRPC code that plugins and hosts in other
// languages see; the Failure detail says it exactly.
var kindCodes = map[sdk.ErrorKind]codes.Code{
	sdk.Invalid:      codes.InvalidArgument,
	sdk.NotFound:     codes.NotFound,
	sdk.Unauthorized: codes.PermissionDenied,
	sdk.Conflict:     codes.FailedPrecondition,
	sdk.Exhausted:    codes.ResourceExhausted,
	sdk.Unsupported:  codes.Unimplemented,
	sdk.Unavailable:  codes.Unavailable,
	sdk.Deadline:     codes.DeadlineExceeded,
	sdk.Canceled:     codes.Canceled,
	sdk.Internal:     codes.Internal,
}

// ToStatus makes the gRPC error that carries err; nil stays nil.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	f := &pluginpb.Failure{Kind: string(sdk.KindOf(err)), Message: text(err.Error())}
	// Only an error that is one itself keeps its parts: around a wrapped one
	// somebody put words, and those must be kept too.
	if e, ok := err.(*sdk.Error); ok {
		f.Op, f.Message, f.Hint = text(e.Op), text(e.Message), text(e.Hint)
	}
	code, ok := kindCodes[sdk.ErrorKind(f.Kind)]
	if !ok {
		code, f.Kind = codes.Internal, string(sdk.Internal)
	}
	s := status.New(code, text(err.Error()))
	if d, derr := s.WithDetails(f); derr == nil {
		s = d
	}
	return s.Err()
}

// FromStatus rebuilds the error of a call made with ctx; nil stays nil. The
// result is always an *sdk.Error, and errors.Is also finds context.Canceled
// and context.DeadlineExceeded in it where those were the reason.
func FromStatus(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	for _, d := range s.Details() {
		f, ok := d.(*pluginpb.Failure)
		if !ok {
			continue
		}
		e := &sdk.Error{Kind: sdk.ErrorKind(f.GetKind()), Op: f.GetOp(), Message: f.GetMessage(), Hint: f.GetHint()}
		if _, known := kindCodes[e.Kind]; !known {
			e.Kind = sdk.Internal // from a newer plugin
		}
		e.Err = contextError(e.Kind)
		return e
	}
	e := &sdk.Error{Kind: kindOfCode(s.Code()), Op: op, Message: s.Message()}
	// gRPC's own words for the caller's context are of no use to a person.
	if cause := ctx.Err(); cause != nil {
		switch {
		case errors.Is(cause, context.DeadlineExceeded):
			e.Kind, e.Message = sdk.Deadline, "no answer from the plugin in the time allowed"
		default:
			e.Kind, e.Message = sdk.Canceled, "given up by the caller"
		}
	}
	e.Err = contextError(e.Kind)
	return e
}

func contextError(k sdk.ErrorKind) error {
	switch k {
	case sdk.Deadline:
		return context.DeadlineExceeded
	case sdk.Canceled:
		return context.Canceled
	}
	return nil
}

// kindOfCode guesses for plugins that send no detail.
func kindOfCode(c codes.Code) sdk.ErrorKind {
	switch c {
	case codes.InvalidArgument, codes.OutOfRange:
		return sdk.Invalid
	case codes.NotFound:
		return sdk.NotFound
	case codes.Unauthenticated, codes.PermissionDenied:
		return sdk.Unauthorized
	case codes.AlreadyExists, codes.FailedPrecondition, codes.Aborted:
		return sdk.Conflict
	case codes.ResourceExhausted:
		return sdk.Exhausted
	case codes.Unimplemented:
		return sdk.Unsupported
	case codes.Unavailable:
		return sdk.Unavailable
	case codes.DeadlineExceeded:
		return sdk.Deadline
	case codes.Canceled:
		return sdk.Canceled
	}
	return sdk.Internal
}
