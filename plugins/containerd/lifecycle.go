package containerd

import (
	"context"
	"strconv"
	"strings"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Stop implements sdk.Runtime.
func (r *Runtime) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	op := "stop " + a.String()
	ctx = r.in(ctx)
	h, err := r.must(ctx, op, a)
	if err != nil {
		return sdk.Container{}, err
	}
	switch h.container.State {
	case sdk.StateExited:
		return h.container, nil
	case sdk.StateCreated:
		// Never ran: there is no exit to report but that it was ended.
		cctx, cancel := after(ctx)
		defer cancel()
		if err := r.discard(cctx, h.id, h.container.Ports); err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		h.container.State, h.container.Reason = sdk.StateExited, "stopped before it ran"
		return h.container, nil
	}
	if bug("early-clean-up") {
		_ = r.bridge.release(ctx, h.id, h.container.Ports)
	}
	// Asked before the signal, so that the exit cannot be missed.
	exited := make(chan error, 1)
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, err := r.client.TaskService().Wait(wctx, &tasksapi.WaitRequest{ContainerID: h.id})
		exited <- errgrpc.ToNative(err)
	}()
	if grace > 0 {
		if err := r.kill(ctx, h, stopSignal(h.record.Labels[labelStop])); err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case err := <-exited:
			return r.stopped(ctx, op, a, err)
		case <-ctx.Done():
			return sdk.Container{}, r.fail(op, context.Cause(ctx))
		case <-timer.C:
		}
	}
	if err := r.kill(ctx, h, unix.SIGKILL); err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	select {
	case err := <-exited:
		return r.stopped(ctx, op, a, err)
	case <-ctx.Done():
		return sdk.Container{}, r.fail(op, context.Cause(ctx))
	}
}

func (r *Runtime) stopped(ctx context.Context, op string, a sdk.Attempt, err error) (sdk.Container, error) {
	if err != nil && !errdefs.IsNotFound(err) {
		return sdk.Container{}, r.fail(op, err)
	}
	h, err := r.must(ctx, op, a)
	if err != nil {
		return sdk.Container{}, err
	}
	if h.container.State != sdk.StateExited {
		return sdk.Container{}, sdk.Errorf(sdk.Unavailable, op, "containerd reports an exit and a running task: ask again")
	}
	return h.container, nil
}

// kill signals the first process, with SIGKILL every process. One that is
// gone is no error.
func (r *Runtime) kill(ctx context.Context, h *held, s syscall.Signal) error {
	_, err := r.client.TaskService().Kill(ctx, &tasksapi.KillRequest{ContainerID: h.id, Signal: uint32(s), All: s == unix.SIGKILL})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) || err != nil && strings.Contains(err.Error(), "process already finished") {
		return nil
	}
	return err
}

// stopSignal reads what images say: "SIGUSR1", "USR1", "10" or "RTMIN+3".
func stopSignal(s string) syscall.Signal {
	name := strings.ToUpper(strings.TrimSpace(s))
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n)
	}
	name = strings.TrimPrefix(name, "SIG")
	const rtMin, rtMax = 34, 64 // as seen by programs: the C library keeps two
	if rest, ok := strings.CutPrefix(name, "RTMIN"); ok {
		if n, err := strconv.Atoi(strings.TrimPrefix(rest, "+")); rest == "" || err == nil && n >= 0 && n <= rtMax-rtMin {
			return syscall.Signal(rtMin + n)
		}
	}
	if rest, ok := strings.CutPrefix(name, "RTMAX"); ok {
		if n, err := strconv.Atoi(strings.TrimPrefix(rest, "-")); rest == "" || err == nil && n >= 0 && n <= rtMax-rtMin {
			return syscall.Signal(rtMax - n)
		}
	}
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig
	}
	return unix.SIGTERM
}

// Remove implements sdk.Runtime.
func (r *Runtime) Remove(ctx context.Context, a sdk.Attempt) error {
	op := "remove " + a.String()
	if err := validAttempt(op, a); err != nil {
		return err
	}
	ctx = r.in(ctx)
	unlock, err := r.tasks.lock(ctx, containerID(a))
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	h, err := r.find(ctx, a)
	if err != nil {
		return r.fail(op, err)
	}
	var ports []sdk.PortMapping
	if h != nil {
		if h.container.State == sdk.StateRunning {
			return sdk.Errorf(sdk.Conflict, op, "it is running").WithHint("stop it first")
		}
		ports = h.container.Ports
	}
	if _, err := r.chooseSnapshotter(ctx); err != nil { // discard looks there for leftovers
		return r.fail(op, err)
	}
	if err := r.discard(ctx, containerID(a), ports); err != nil {
		return r.fail(op, err)
	}
	if len(r.shims(containerID(a))) > 0 { // of an interrupted start
		if err := r.awaitShims(ctx, containerID(a), settleTime); err != nil {
			return r.fail(op, err)
		}
	}
	return nil
}

// Stats implements sdk.Runtime.
func (r *Runtime) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	op := "measure " + a.String()
	h, err := r.must(r.in(ctx), op, a)
	if err != nil {
		return sdk.Stats{}, err
	}
	if h.container.State != sdk.StateRunning {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, op, "it is not running")
	}
	s, err := r.cgroups.stats(r.cgroupOf(a.Task) + "/" + leafName(a))
	if err != nil {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, op, "its cgroup is gone: %w", err)
	}
	return s, nil
}
