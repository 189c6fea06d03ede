package link

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	"github.com/belay-edge/belay/controlplane/wire/wiretest"
)

func enrollConfig(t *testing.T, control *wiretest.ControlPlane, transport string, addresses ...string) EnrollConfig {
	t.Helper()
	key, _ := wiretest.NewDevice(t)
	if len(addresses) == 0 {
		addresses = []string{control.Address()}
	}
	q := wiretest.Must(t, "v1-enroll").Steps[1].Frame.GetEnrollRequest()
	code, err := wire.ActivationCode{Addresses: addresses, Pin: control.CA.Pin(), ID: q.ActivationId, Secret: q.Secret}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return EnrollConfig{
		Code: code, Key: key, Transport: transport,
		HashedMachineID: q.HashedMachineId, AgentVersion: q.AgentVersion, Hostname: q.Hostname, Facts: q.Facts,
	}
}

type enrolled struct {
	Enrollment
	err error
}

func enroll(t *testing.T, cfg EnrollConfig) <-chan enrolled {
	t.Helper()
	out := make(chan enrolled, 1)
	ctx, cancel := context.WithTimeout(context.Background(), wiretest.Patience)
	t.Cleanup(cancel)
	go func() {
		e, err := Enroll(ctx, cfg)
		out <- enrolled{e, err}
	}()
	return out
}

func TestEnrollByTheTranscriptOfVersion1(t *testing.T) {
	for _, transport := range []string{TransportAuto, wire.TransportQUIC, wire.TransportTCP} {
		t.Run(transport, func(t *testing.T) {
			control := wiretest.NewControlPlane(t)
			got := enroll(t, enrollConfig(t, control, transport))
			p := control.Next(t)
			p.Grease = true
			p.Play(wiretest.Must(t, "v1-enroll"), wiretest.Control, nil)
			e := <-got
			if e.err != nil {
				t.Fatal(e.err)
			}
			want := Enrollment{
				InstanceID: instanceA, Cluster: "default", Pin: control.CA.Pin(), Transport: p.Transport(),
				Addresses: []string{control.Address(), "control.example:7443"},
			}
			if diff := cmp.Diff(want, e.Enrollment); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEnrollRefusedByTheTranscriptOfVersion1(t *testing.T) {
	control := wiretest.NewControlPlane(t)
	got := enroll(t, enrollConfig(t, control, wire.TransportTCP))
	control.Next(t).Play(wiretest.Must(t, "v1-enroll-refused"), wiretest.Control, nil)
	e := <-got
	if !errors.Is(e.err, ErrRefused) || wire.CodeOf(e.err) != wire.CodeExhausted || !strings.Contains(e.err.Error(), "used up") {
		t.Errorf("got %v", e.err)
	}
}

func TestEachRefusalHasItsOwnWords(t *testing.T) {
	seen := map[string]string{}
	for _, code := range []string{wire.CodeNotFound, wire.CodeUnknownKey, wire.CodeExpired, wire.CodeExhausted,
		wire.CodePrecondition, wire.CodeVersion, wire.CodeOverloaded, wire.CodeUnavailable, "from the future"} {
		_, err := accept(&wire.EnrollResponse{Failure: wire.Failf(code, "no")}, wire.ActivationCode{}, "a:1", "tcp")
		if !errors.Is(err, ErrRefused) || wire.CodeOf(err) != code {
			t.Errorf("%s: %v", code, err)
			continue
		}
		if other := seen[err.Error()]; other != "" {
			t.Errorf("%s and %s read the same", code, other)
		}
		seen[err.Error()] = code
	}
}

func TestEnrollErrors(t *testing.T) {
	control, other := wiretest.NewControlPlane(t), wiretest.NewControlPlane(t)
	good := enrollConfig(t, control, wire.TransportTCP)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	_ = l.Close()
	rude, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rude.Close() })
	go func() {
		for {
			c, err := rude.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("SSH-2.0-OpenSSH_9.2\r\n"))
			_ = c.Close()
		}
	}()
	with := func(edit func(*EnrollConfig)) EnrollConfig {
		cfg := good
		edit(&cfg)
		return cfg
	}
	tests := []struct {
		name string
		cfg  EnrollConfig
		want error
	}{
		{"not a code", with(func(c *EnrollConfig) { c.Code = "hello" }), wire.ErrNotACode},
		{"tampered", with(func(c *EnrollConfig) { c.Code = c.Code[:20] + "x" + c.Code[21:] }), wire.ErrDamagedCode},
		{"newer", with(func(c *EnrollConfig) { c.Code = "belay9.abc" }), wire.ErrNewerCode},
		{"another key", enrollConfig(t, control, wire.TransportTCP, other.Address()), carrier.ErrWrongPin},
		{"another key over either", enrollConfig(t, control, TransportAuto, other.Address()), carrier.ErrWrongPin},
		{"nobody there", enrollConfig(t, control, wire.TransportTCP, nobody), ErrUnreachable},
		{"something else there", enrollConfig(t, control, wire.TransportTCP, rude.Addr().String()), carrier.ErrNotControlPlane},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if e := <-enroll(t, tt.cfg); !errors.Is(e.err, tt.want) {
				t.Errorf("got %v, want %v", e.err, tt.want)
			}
		})
	}
	if err := CheckTransport("sctp"); err == nil {
		t.Error("transport sctp")
	}
}

func TestEnrollTriesTheNextAddress(t *testing.T) {
	control, other := wiretest.NewControlPlane(t), wiretest.NewControlPlane(t)
	got := enroll(t, enrollConfig(t, control, wire.TransportQUIC, other.Address(), control.Address()))
	control.Next(t).Play(wiretest.Must(t, "v1-enroll"), wiretest.Control, nil)
	select {
	case e := <-got:
		if e.err != nil || e.Addresses[0] != control.Address() {
			t.Errorf("%+v", e)
		}
	case <-time.After(wiretest.Patience):
		t.Fatal("no end")
	}
}
