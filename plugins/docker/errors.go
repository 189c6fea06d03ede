package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"syscall"

	"github.com/belay-edge/belay/plugins/sdk"
)

// fail turns what the daemon or the kernel said into an *sdk.Error. One that
// is already an *sdk.Error keeps its kind and hint.
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
	var away *awayError
	var answer *apiError
	isAPI := errors.As(err, &answer)
	switch {
	case errors.Is(err, context.Canceled):
		return sdk.Canceled, ""
	case errors.Is(err, context.DeadlineExceeded):
		return sdk.Deadline, ""
	case errors.As(err, &away):
		return sdk.Unavailable, r.daemonHint(err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), has("no space left on device", "disk quota exceeded"):
		return sdk.Exhausted, "free some disk space"
	case has("port is already allocated", "address already in use"):
		return sdk.Conflict, "use another host port, or 0 to have one chosen"
	case has("cannot assign requested address"):
		return sdk.Invalid, "this host has no such address: leave hostIP out, or give one of the device's own"
	case has("invalid tmpfs option"):
		return sdk.Invalid, "check the mountOptions of tmpfs"
	case has("unable to apply caps"):
		return sdk.Unsupported, "this device does not have every capability of its kernel to give: leave privileged out, or add the capabilities that are needed"
	case has("docker-init") && has("not found", "no such file"):
		return sdk.Unsupported, "initProcessEnabled needs docker-init on this device: install tini, or leave it out"
	case has("unknown or invalid runtime name", "Unknown runtime"):
		return sdk.Unsupported, "the Docker daemon has no such runtime: see runtimes in /etc/docker/daemon.json"
	case has("could not select device driver"):
		return sdk.Unsupported, "install the vendor's container toolkit"
	case has("OOM-killed", "memory limit too low", "unable to set memory limit", "cannot allocate memory"):
		return sdk.Invalid, "give the container more memory: it has too little even to start"
	case has("/proc/sys/", "sysctl"):
		return sdk.Invalid, "check systemControls: this kernel does not take one of them in a container"
	case has("chdir to cwd"), has("cwd") && has("not a directory", "permission denied"):
		return sdk.Invalid, "the working directory is not a directory that the user may enter"
	case has("gathering device information"):
		return sdk.NotFound, "is it plugged in, and its driver loaded?"
	case has("exec format error"):
		return sdk.Invalid, "the image holds a program for another processor"
	case has("executable file not found"), has("exec: ") && has("no such file or directory"):
		return sdk.NotFound, "the command does not exist in this image: check entryPoint and command"
	case has("exec: ") && has("permission denied", "is a directory"):
		return sdk.Invalid, "the command is not an executable file in this image"
	case has("unable to find user", "unable to find group", "no matching entries in passwd file"):
		return sdk.Invalid, "the image has no such user"
	case isAPI && answer.Status == http.StatusNotFound:
		return sdk.NotFound, ""
	case isAPI && answer.Status == http.StatusConflict:
		return sdk.Conflict, ""
	case isAPI && answer.Status == http.StatusBadRequest:
		return sdk.Invalid, ""
	case isAPI && answer.Status == http.StatusNotImplemented:
		return sdk.Unsupported, ""
	case isAPI && answer.Status == http.StatusServiceUnavailable:
		return sdk.Unavailable, ""
	case errors.Is(err, fs.ErrPermission):
		return sdk.Unavailable, "the agent must run as root"
	}
	return sdk.KindOf(err), ""
}

// daemonHint says what to do about a daemon that does not answer.
func (r *Runtime) daemonHint(err error) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("the agent may not open %s: it must run as root", r.cfg.Address)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("there is no socket %s: start Docker (systemctl start docker), or set address if it listens elsewhere", r.cfg.Address)
	}
	return fmt.Sprintf("the Docker daemon does not answer at %s: see systemctl status docker", r.cfg.Address)
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
