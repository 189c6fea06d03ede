package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/belay-edge/belay/plugins/sdk"
)

// fail turns what containerd, its shim or the kernel said into an *sdk.Error.
// One that is already an *sdk.Error keeps its kind and hint.
func (r *Runtime) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	var known *sdk.Error
	if errors.As(err, &known) {
		if known.Op == "" {
			known.Op = op
		}
		return known
	}
	kind, hint := r.classify(err)
	e := sdk.Errorf(kind, op, "%w", err)
	e.Message = clip(e.Message)
	return e.WithHint(hint)
}

func (r *Runtime) classify(err error) (kind sdk.ErrorKind, hint string) {
	msg := err.Error()
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(msg, p) {
				return true
			}
		}
		return false
	}
	switch {
	case errors.Is(err, context.Canceled):
		return sdk.Canceled, ""
	case errors.Is(err, context.DeadlineExceeded):
		return sdk.Deadline, ""
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), has("no space left on device", "disk quota exceeded"):
		return sdk.Exhausted, "free some disk space"
	case errdefs.IsUnavailable(err), errdefs.IsUnavailable(errgrpc.ToNative(err)), has("error reading from server: EOF", "ttrpc: closed"):
		return sdk.Unavailable, r.daemonHint(msg)
	case has("OOM-killed", "memory limit too low", "unable to set memory limit", "cannot allocate memory"):
		return sdk.Invalid, "give the container more memory: it has too little even to start"
	case has("/proc/sys/"):
		return sdk.Invalid, "check systemControls: this kernel does not take one of them in a container"
	case has("chdir to cwd", "mkdir /", "not a directory: unknown") && has("cwd", "not a directory"):
		return sdk.Invalid, "the working directory is not a directory that the user may enter"
	case has("executable file not found", "exec format error"),
		has(`exec: "`) && has("no such file or directory", "is a directory", "permission denied"),
		has("no such file or directory: unknown", "is a directory: unknown", "permission denied: unknown") && has("exec"):
		switch {
		case has("exec format error"):
			return sdk.Invalid, "the image holds a program for another processor"
		case has("permission denied", "is a directory"):
			return sdk.Invalid, "the command is not an executable file in this image"
		}
		return sdk.NotFound, "the command does not exist in this image: check entryPoint and command"
	case errors.Is(err, fs.ErrPermission):
		return sdk.Unavailable, "the agent must run as root"
	case errdefs.IsNotFound(err):
		return sdk.NotFound, ""
	case errdefs.IsAlreadyExists(err), errdefs.IsConflict(err):
		return sdk.Conflict, ""
	case errdefs.IsInvalidArgument(err):
		return sdk.Invalid, ""
	case errdefs.IsResourceExhausted(err):
		return sdk.Exhausted, ""
	case errdefs.IsNotImplemented(err):
		return sdk.Unsupported, ""
	}
	return sdk.KindOf(err), ""
}

// daemonHint says what to do about a containerd that does not answer.
func (r *Runtime) daemonHint(msg string) string {
	switch {
	case strings.Contains(msg, "permission denied"):
		return fmt.Sprintf("the agent may not open %s: it must run as root", r.cfg.Address)
	case strings.Contains(msg, "no such file"):
		return fmt.Sprintf("there is no socket %s: start containerd (systemctl start containerd), or set address if it listens elsewhere", r.cfg.Address)
	}
	return fmt.Sprintf("containerd does not answer at %s: see systemctl status containerd", r.cfg.Address)
}

// clip keeps runc's messages, which may quote whole logs, readable.
func clip(s string) string {
	s = strings.TrimSpace(s)
	const most = 1000
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}
