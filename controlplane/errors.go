package controlplane

import (
	"errors"
	"fmt"
)

// Code sorts failures by what the caller should do. Each is an error itself,
// so that errors.Is(err, controlplane.NotFound) works.
type Code string

// The codes.
const (
	InvalidArgument Code = "invalid_argument"    // the request can never succeed
	NotFound        Code = "not_found"           // no such object
	AlreadyExists   Code = "already_exists"      // create of what is there
	Conflict        Code = "aborted"             // lost a race too often: try again
	Precondition    Code = "failed_precondition" // not in this state of the object
	Exhausted       Code = "resource_exhausted"  // a limit was reached
	Unauthenticated Code = "unauthenticated"     // who are you
	Denied          Code = "permission_denied"   // you may not
	Unavailable     Code = "unavailable"         // try again: device or store is away
	Expired         Code = "expired"             // its time is over
)

// Error makes a code usable with errors.Is.
func (c Code) Error() string { return string(c) }

// Error is a failure for a person, with a code for a program.
type Error struct {
	Code    Code
	Message string // what was tried, what failed, what to do
	Err     error
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives the code and the cause to errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Code}
	}
	return []error{e.Code, e.Err}
}

// Errorf makes an *Error; %w keeps the cause.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// CodeOf finds the code of any error; "" when it has none.
func CodeOf(err error) Code {
	var e *Error
	var c Code
	switch {
	case errors.As(err, &e):
		return e.Code
	case errors.As(err, &c):
		return c
	}
	return ""
}
