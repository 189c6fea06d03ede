package sdk

import (
	"context"
	"errors"
	"fmt"
)

// ErrorKind sorts failures by what the caller should do about them.
type ErrorKind string

// The kinds of failure. Each is an error itself, so that
// errors.Is(err, sdk.NotFound) works on both sides of the process boundary.
const (
	Invalid      ErrorKind = "invalid"      // the request can never succeed
	NotFound     ErrorKind = "not-found"    // no such image, program, attempt
	Unauthorized ErrorKind = "unauthorized" // credentials missing or refused
	Conflict     ErrorKind = "conflict"     // something else has it: port, name, state
	Exhausted    ErrorKind = "exhausted"    // disk, memory, pids: free some and retry
	Unsupported  ErrorKind = "unsupported"  // this runtime, kernel or build cannot
	Unavailable  ErrorKind = "unavailable"  // try again: daemon, registry or network is away
	Deadline     ErrorKind = "deadline"     // it took longer than was allowed
	Canceled     ErrorKind = "canceled"     // the caller gave up
	Internal     ErrorKind = "internal"     // everything else
)

// Error makes a kind usable with errors.Is.
func (k ErrorKind) Error() string { return string(k) }

// Error is a failure that survives the process boundary.
type Error struct {
	Kind    ErrorKind
	Op      string // what was tried: "pull registry.local/app:1"
	Message string // what failed
	Hint    string // what to do about it; may be empty
	Err     error  // cause, on the side that made the error only
}

func (e *Error) Error() string {
	s := e.Message
	if e.Op != "" {
		s = e.Op + ": " + s
	}
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap gives the kind and the cause to errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// Errorf makes an *Error; %w keeps the cause.
func Errorf(kind ErrorKind, op, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Op: op, Message: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint adds what the person reading the error should do.
func (e *Error) WithHint(hint string) *Error {
	e.Hint = hint
	return e
}

// KindOf finds the kind of any error: Deadline and Canceled for those of
// package context, Internal when nothing is known.
func KindOf(err error) ErrorKind {
	var e *Error
	var k ErrorKind
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Kind
	case errors.As(err, &k):
		return k
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	case errors.Is(err, context.Canceled):
		return Canceled
	}
	return Internal
}
