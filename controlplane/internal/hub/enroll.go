package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// enroll serves a session of wire.ProtocolEnroll: one question, one answer.
func (h *Hub) enroll(ctx context.Context, s wire.Session, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stream, err := acceptControl(ctx, s)
	if err != nil {
		log.Debug("enrolment ended early", "err", err)
		closeEarly(ctx, s, err)
		return
	}
	f, err := await(ctx, stream, func(f *wire.Frame) bool { return f.GetEnrollRequest() != nil })
	if err != nil {
		log.Debug("enrolment ended early", "err", err)
		closeEarly(ctx, s, err)
		return
	}
	answer := h.decideEnrollment(ctx, f.GetEnrollRequest(), wire.Fingerprint(s.PeerCertificate()), log)
	_ = stream.SetDeadline(time.Now().Add(writeTimeout))
	if err := wire.WriteFrame(stream, &wire.Frame{Body: &wire.Frame_EnrollResponse{EnrollResponse: answer}}); err != nil {
		log.Warn("the device did not hear how its enrolment went; it may enrol again with the same key", "err", err)
		return
	}
	linger(s, stream)
}

func (h *Hub) decideEnrollment(ctx context.Context, q *wire.EnrollRequest, key string, log *slog.Logger) *wire.EnrollResponse {
	if q.Version == 0 {
		return &wire.EnrollResponse{Failure: wire.Failf(wire.CodeVersion, "the agent does not say which version of the protocol it speaks")}
	}
	if failure := h.gate.enter(); failure != nil {
		return &wire.EnrollResponse{Failure: failure}
	}
	instance, already, err := h.devices.Enroll(ctx, controlplane.Enrollment{
		ActivationID:    q.ActivationId,
		Secret:          q.Secret,
		KeyFingerprint:  key,
		HashedMachineID: q.HashedMachineId,
		Hostname:        q.Hostname,
		AgentVersion:    q.AgentVersion,
		Facts:           factsOf(q.Facts),
	})
	if err != nil {
		f := failureOf(err, log, "enrol a device")
		log.Info("enrolment refused", "activation", legible(q.ActivationId), "code", f.Code)
		return &wire.EnrollResponse{Failure: f}
	}
	log.Info("device enrolled", "instance", instance.ID, "cluster", instance.Cluster, "already", already)
	return &wire.EnrollResponse{
		InstanceId:      instance.ID,
		Cluster:         instance.Cluster,
		Addresses:       h.cfg.Advertise,
		AlreadyEnrolled: already,
	}
}

// acceptControl waits for the stream that carries the conversation, gives up
// others, and leaves a deadline on it for what comes first.
func acceptControl(ctx context.Context, s wire.Session) (wire.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	// What yamux holds for a stream given up stays for some time.
	for range maxOpening {
		stream, err := s.AcceptStream(ctx)
		if err != nil {
			return nil, err
		}
		_ = stream.SetDeadline(time.Now().Add(helloTimeout))
		f, err := await(ctx, stream, func(f *wire.Frame) bool { return f.GetOpen() != nil })
		if err != nil {
			_ = stream.Close()
			return nil, err
		}
		if f.GetOpen().Type == wire.StreamType_STREAM_TYPE_CONTROL {
			return stream, nil
		}
		_ = stream.Close()
	}
	return nil, fmt.Errorf("%w: of %d streams none is a control stream", wire.ErrFrame, maxOpening)
}

// await is wire.Await that also ends with ctx: a shutdown does not wait for
// peers that say nothing.
func await(ctx context.Context, s wire.Stream, want func(*wire.Frame) bool) (*wire.Frame, error) {
	defer context.AfterFunc(ctx, func() { _ = s.SetReadDeadline(time.Now()) })()
	return wire.Await(s, want)
}

// closeEarly ends a session that has not said what was due: by its own fault,
// or because this side has no time left for it.
func closeEarly(ctx context.Context, s wire.Session, err error) {
	var e *ending
	if errors.As(context.Cause(ctx), &e) {
		s.Close(e.failure.Code, e.failure.Message)
		return
	}
	s.Close(wire.CodeProtocol, err.Error())
}

// legible is an id as it may be logged of a peer nobody knows yet.
func legible(id string) string {
	if len(id) > 64 {
		return id[:64] + "..."
	}
	return id
}

// linger lets the peer read what was last written before the session is cut:
// the peer closes it when it has, and lastWords is for one that does not.
func linger(s wire.Session, stream wire.Stream) {
	_ = stream.CloseWrite()
	t := time.NewTimer(lastWords)
	defer t.Stop()
	select {
	case <-s.Done():
	case <-t.C:
	}
}

func factsOf(f *wire.Facts) controlplane.Facts {
	out := controlplane.Facts{
		Attributes: f.GetAttributes(),
		CPU:        int(min(f.GetCpu(), 1<<31)),
		MemoryMiB:  int(min(f.GetMemoryMib(), 1<<31)),
	}
	for _, p := range f.GetPlugins() {
		out.Plugins = append(out.Plugins, controlplane.PluginInfo{
			Name: p.GetName(), Version: p.GetVersion(), Kinds: p.GetKinds(), State: p.GetState(),
			LastError: p.GetLastError(), Checksum: p.GetChecksum(), Restarts: int(p.GetRestarts()), Networks: p.GetNetworks(),
			Protocol: int(min(p.GetProtocolVersion(), 1<<16)), MemoryBytes: p.GetMemoryBytes(), MemoryMaxBytes: p.GetMemoryMaxBytes(), Missing: p.GetMissing(),
		})
	}
	for _, d := range f.GetDevices() {
		out.Devices = append(out.Devices, controlplane.DeviceFact{
			Plugin: d.GetPlugin(), ID: d.GetId(), Kind: d.GetKind(), Ready: d.GetReady(), Health: d.GetHealth(),
			Reason: d.GetReason(), Shares: int(min(d.GetShares(), 1<<16)), Attributes: d.GetAttributes(),
		})
	}
	for _, p := range f.GetReservedPorts() {
		out.ReservedPorts = append(out.ReservedPorts, controlplane.PortKey{Protocol: p.GetProtocol(), Port: int(p.GetPort())})
	}
	return out
}
