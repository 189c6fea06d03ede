package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Start implements sdk.Runtime.
func (r *Runtime) Start(ctx context.Context, q sdk.StartRequest) (sdk.Container, error) {
	op := "start " + q.Attempt.String()
	if err := validAttempt(op, q.Attempt); err != nil {
		return sdk.Container{}, err
	}
	ctx = r.in(ctx)
	unlock, err := r.tasks.lock(ctx, containerID(q.Attempt))
	if err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	defer unlock()
	// An earlier process of this plugin may have died in the middle of the
	// same Start, and containerd may still be at what that one asked for: it
	// gives up on its own, and until it has, the name is not free.
	interrupted := false
	var left error        // by the last try
	var refused time.Time // for a bundle without a shim, first
	defer func() {
		if left != nil {
			r.log.Error("a failed start left something behind", "container", containerID(q.Attempt), "err", left)
		}
	}()
	for deadline := time.Now().Add(settleTime); ; {
		c, err := r.adoptOrCreate(ctx, q)
		left = nil
		if u := (*undoneError)(nil); errors.As(err, &u) {
			err, left = u.error, u.left
		}
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, errHalfMade) && time.Now().Before(deadline):
			interrupted = true
			r.log.Info("cleared away what an interrupted start left", "container", containerID(q.Attempt))
		case (interrupted || nameTaken(err)) && unsettled(err) && time.Now().Before(deadline):
			interrupted = true
		default:
			return sdk.Container{}, r.fail(op, err)
		}
		if bundle := r.forgottenBundle(err, containerID(q.Attempt)); bundle == "" {
			refused = time.Time{}
		} else if refused.IsZero() {
			refused = time.Now()
		} else if time.Since(refused) > shimPatience {
			r.log.Warn("clearing away a bundle that containerd has forgotten", "container", containerID(q.Attempt), "bundle", bundle, "err", clearBundle(ctx, bundle))
		}
		if err := r.awaitShims(ctx, containerID(q.Attempt), time.Until(deadline)); err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
	}
}

// settleTime is how long containerd gets to end an abandoned start.
const settleTime = 30 * time.Second

var errHalfMade = errors.New("half made by an interrupted start")

// undoneError is a start that failed and could not be undone.
type undoneError struct {
	error
	left error
}

func (e *undoneError) Unwrap() error { return e.error }

// nameTaken tells whether a start failed because something of the same name is
// there: containerd's word for it, that of a shim whose directory an abandoned
// start has not given back yet, or that of runc, whose state containerd clears
// away after that failure.
func nameTaken(err error) bool {
	return errdefs.IsAlreadyExists(err) || strings.Contains(err.Error(), "file exists") || strings.Contains(err.Error(), "given ID already exists")
}

// unsettled tells whether a start failed because an abandoned one of the same
// name is still being undone.
func unsettled(err error) bool {
	var known *sdk.Error
	if errors.As(err, &known) {
		return false
	}
	return nameTaken(err) || errdefs.IsNotFound(err) ||
		strings.Contains(err.Error(), "failed to start shim") || strings.Contains(err.Error(), "ttrpc: closed") ||
		strings.Contains(err.Error(), "unable to retrieve OCI runtime error") // the bundle was removed under runc
}

func (r *Runtime) adoptOrCreate(ctx context.Context, q sdk.StartRequest) (sdk.Container, error) {
	h, err := r.find(ctx, q.Attempt)
	switch {
	case err != nil:
		return sdk.Container{}, err
	case h == nil:
		return r.create(ctx, q)
	case h.container.State != sdk.StateCreated:
		return h.container, nil
	}
	// Made and never run: whether its network was finished is not known, and
	// nothing of it has run, so it is made again.
	cctx, cancel := after(ctx)
	defer cancel()
	if err := r.discard(cctx, h.id, h.container.Ports); err != nil {
		return sdk.Container{}, err
	}
	return sdk.Container{}, errHalfMade
}

// create makes and starts an attempt of which there is nothing yet.
func (r *Runtime) create(ctx context.Context, q sdk.StartRequest) (_ sdk.Container, err error) {
	id := containerID(q.Attempt)
	p, err := r.plan(ctx, q)
	if err != nil {
		return sdk.Container{}, err
	}
	release, err := r.reservePorts(ctx, id, q.Spec.Ports)
	if err != nil {
		return sdk.Container{}, err
	}
	defer release()
	unknown := false // whether the program has run
	defer func() {
		if err != nil && !unknown {
			ctx, cancel := after(ctx)
			defer cancel()
			if left := r.discard(ctx, id, q.Spec.Ports); left != nil {
				err = &undoneError{err, left}
			}
		}
	}()
	if err := r.writeFiles(id, p); err != nil {
		return sdk.Container{}, fmt.Errorf("write the container's files: %w", err)
	}
	if p.network == sdk.NetworkBridge {
		// A start that was interrupted before containerd knew of it has left
		// a namespace that may hold anything.
		if err := r.bridge.release(ctx, id, q.Spec.Ports); err != nil {
			return sdk.Container{}, err
		}
		if p.netns, err = r.bridge.makeNetNS(id); err != nil {
			return sdk.Container{}, err
		}
	}
	// The address is needed when the program runs, not before: CNI plugins
	// and runc work side by side.
	var rec containers.Container
	g, gctx := errgroup.WithContext(ctx)
	if p.network == sdk.NetworkBridge {
		g.Go(func() error {
			ip, err := r.bridge.connect(gctx, id, q.Spec.Ports)
			if err != nil {
				return err
			}
			return r.writeAddress(id, p, ip)
		})
	}
	g.Go(func() (err error) { rec, err = r.createTask(gctx, p); return })
	if err := g.Wait(); err != nil {
		return sdk.Container{}, err
	}
	if err := ctx.Err(); err != nil {
		return sdk.Container{}, err // the last moment to give up
	}
	if err := r.mark(id, "started"); err != nil {
		return sdk.Container{}, err
	}
	// From here on the program may run. If the caller goes away now it stays:
	// the next one to ask finds it, where undoing it would run it twice.
	ctx, cancel := after(ctx)
	defer cancel()
	_, err = r.client.TaskService().Start(ctx, &tasksapi.StartRequest{ContainerID: id})
	if err != nil {
		err = errgrpc.ToNative(err)
	}
	// It may have ended by now: what counts is how it is, not that it started.
	var h held
	proc, found := r.process(ctx, id)
	if found == nil {
		h, found = r.view(rec, proc)
	}
	switch {
	case found != nil:
		unknown = true
		return sdk.Container{}, errors.Join(err, found)
	case err == nil || h.container.State == sdk.StateRunning:
		return h.container, nil
	}
	return sdk.Container{}, err
}

// createTask makes the container's record, root file system and process; the
// process waits to be started. It returns the record.
//
// It calls containerd's services one by one where its client would read again
// and again what is known here.
func (r *Runtime) createTask(ctx context.Context, p *plan) (containers.Container, error) {
	labels := map[string]string{}
	for k, v := range p.q.Spec.Labels {
		labels[k] = v
	}
	a := p.q.Attempt
	for k, v := range map[string]string{
		labelOwner: r.owner, labelTask: a.Task, labelContainer: a.Container, labelAttempt: strconv.Itoa(a.Number),
		labelBoot: r.bootID, labelDigest: p.q.Spec.Digest, labelNetwork: p.network, labelStop: p.about.config.StopSignal,
	} {
		labels[k] = v
	}
	for i, m := range p.q.Spec.Ports {
		labels[labelPort+strconv.Itoa(i)] = portLabel(m)
	}
	// Of a known name: one that a killed process has left can be found. The
	// container's record takes over what it holds, and it ends by itself or
	// with the container: ending it here would be one more write to wait for.
	_, err := r.client.LeasesService().Create(ctx, leases.WithID(p.id), leases.WithExpiration(time.Hour))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return containers.Container{}, err
	}
	leased := leases.WithLease(ctx, p.id)
	snapshots := r.client.SnapshotService(p.snapshotter)
	root, err := snapshots.Prepare(leased, p.id, p.about.chain)
	if errdefs.IsAlreadyExists(err) {
		// A snapshot whose container was never recorded.
		if e := snapshots.Remove(ctx, p.id); e != nil && !errdefs.IsNotFound(e) {
			return containers.Container{}, errors.Join(err, e)
		}
		root, err = snapshots.Prepare(leased, p.id, p.about.chain)
	}
	if err != nil {
		return containers.Container{}, fmt.Errorf("make the root file system: %w", err)
	}
	rec := containers.Container{
		ID: p.id, Labels: labels, Image: p.image.Name, Runtime: containers.RuntimeInfo{Name: r.cfg.Runtime},
		Snapshotter: p.snapshotter, SnapshotKey: p.id,
	}
	if err := client.WithNewSpec(r.specOpts(p, root)...)(ctx, r.client, &rec); err != nil {
		return rec, err
	}
	if rec, err = r.client.ContainerService().Create(leased, rec); err != nil {
		return rec, err
	}
	r.mu.Lock()
	r.attempts[p.id] = a // its events need not ask for the record
	r.mu.Unlock()
	_, err = r.client.TaskService().Create(ctx, &tasksapi.CreateTaskRequest{
		ContainerID: p.id, Rootfs: mount.ToProto(root),
		// The shim opens these itself: plugin and agent may die, and the
		// container keeps writing. It takes plain paths as FIFOs or as files
		// to append to.
		Terminal: p.q.Spec.Terminal, Stdin: p.stdin, Stdout: p.q.Stdout, Stderr: p.stderr(),
	})
	if err != nil {
		err = errgrpc.ToNative(err)
	}
	return rec, err
}

// dropLease ends the hold on what createTask makes; none is no error.
func (r *Runtime) dropLease(ctx context.Context, id string) error {
	if err := r.client.LeasesService().Delete(ctx, leases.Lease{ID: id}); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease: %w", err)
	}
	return nil
}

// discard removes everything made for a container, whatever there is of it.
func (r *Runtime) discard(ctx context.Context, id string, ports []sdk.PortMapping) error {
	c, err := r.client.LoadContainer(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		r.mu.Lock()
		s := r.snapshotter
		r.mu.Unlock()
		if s != "" {
			if err := r.client.SnapshotService(s).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("remove snapshot: %w", err)
			}
		}
	case err != nil:
		return err
	default:
		t, err := c.Task(ctx, nil)
		if err == nil {
			if _, err := t.Delete(ctx, client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("delete task: %w", err)
			}
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("delete container: %w", err)
		}
	}
	if err := r.dropLease(ctx, id); err != nil {
		return err
	}
	if err := r.bridge.release(ctx, id, ports); err != nil {
		return err
	}
	if err := os.RemoveAll(r.containerDir(id)); err != nil {
		return err
	}
	r.mu.Lock()
	delete(r.attempts, id)
	r.mu.Unlock()
	return nil
}

// makeFIFO makes a FIFO unless there is one.
func makeFIFO(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
