package wire

import (
	"errors"
	"fmt"
	"time"
)

// Codes of failures, as they travel. A receiver treats one it does not know
// like CodeInternal: try again later.
const (
	CodeInvalid      = "invalid_argument"    // the request can never succeed
	CodeNotFound     = "not_found"           // no such activation, instance, task
	CodeExpired      = "expired"             // the activation's time is over
	CodeExhausted    = "resource_exhausted"  // the activation is used up
	CodeUnknownKey   = "unauthenticated"     // wrong secret, or another key
	CodeDenied       = "permission_denied"   // deregistered
	CodePrecondition = "failed_precondition" // not in this state
	CodeUnavailable  = "unavailable"         // try again
	CodeOverloaded   = "overloaded"          // try again, not sooner than retry_after_ms
	CodeUnsupported  = "unsupported"         // not known to this side
	CodeVersion      = "version"             // no common protocol version
	CodeProtocol     = "protocol"            // broke the rules of the wire
	CodeReplaced     = "replaced"            // a newer session of the same instance
	CodeShutdown     = "shutdown"            // the sender is going away, come back
	CodeInternal     = "internal"
	CodeCloned       = "cloned" // another machine has this identity, and it stays with that one
)

// codeNumbers are the application error codes of QUIC that carry a code when a
// session is closed. Numbers are never reused.
var codeNumbers = map[string]uint64{
	CodeInvalid: 1, CodeNotFound: 2, CodeExpired: 3, CodeExhausted: 4, CodeUnknownKey: 5,
	CodeDenied: 6, CodePrecondition: 7, CodeUnavailable: 8, CodeOverloaded: 9, CodeUnsupported: 10,
	CodeVersion: 11, CodeProtocol: 12, CodeReplaced: 13, CodeShutdown: 14, CodeInternal: 15, CodeCloned: 16,
}

// CodeNumber is the number a carrier sends for a code; 0 for "" (no failure).
func CodeNumber(code string) uint64 {
	if code == "" {
		return 0
	}
	if n, ok := codeNumbers[code]; ok {
		return n
	}
	return codeNumbers[CodeInternal]
}

// CodeOfNumber is the reverse of CodeNumber.
func CodeOfNumber(n uint64) string {
	if n == 0 {
		return ""
	}
	for code, number := range codeNumbers {
		if number == n {
			return code
		}
	}
	return CodeInternal
}

// Error is a failure the other side told of.
type Error struct {
	Code       string
	Message    string
	RetryAfter time.Duration // not sooner than this; 0: as usual
}

func (e *Error) Error() string {
	if e.Message == "" {
		return e.Code
	}
	return e.Message
}

// Err makes an error of a failure; nil of none.
func (f *Failure) Err() error {
	if f == nil {
		return nil
	}
	return &Error{Code: f.Code, Message: f.Message, RetryAfter: time.Duration(f.RetryAfterMs) * time.Millisecond}
}

// Failf makes a failure for the other side.
func Failf(code, format string, args ...any) *Failure {
	return &Failure{Code: code, Message: fmt.Sprintf(format, args...)}
}

// CodeOf finds the code in an error that came over the wire; "" without one.
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
