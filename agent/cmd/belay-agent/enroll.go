package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const maxCodeInput = 64 << 10

func enrollCommand(t terminal) *cobra.Command {
	var o options
	var activation, output string
	var force bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "enroll --activation CODE",
		Short: "Make this device an instance of a control plane",
		Long: `Make this device an instance of a control plane.

The activation code is made there with "belay activation create". It is a
secret: where others can see the arguments of processes, pass it in
BELAY_ACTIVATION, or on standard input with --activation -.

The device's private key is made here and never leaves. An enrolment that was
cut off can be repeated with the same code: it takes no second use of it.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			code, err := readCode(t, activation)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			id, already, err := enroll(ctx, t, cfg, code, force)
			if err != nil {
				return err
			}
			result := struct {
				Instance string `json:"instance"`
				Cluster  string `json:"cluster"`
				Already  bool   `json:"alreadyEnrolled"`
			}{id.ID, id.Cluster, already}
			return show(t, output, result, func() error {
				word := "enrolled"
				if already {
					word = "already enrolled"
				}
				_, err := fmt.Fprintf(t.out, "%s as %s in cluster %s\n", word, id.ID, id.Cluster)
				return err
			})
		},
	}
	c.Flags().StringVar(&activation, "activation", "", "activation `code`, or - to read it from standard input (default $BELAY_ACTIVATION)")
	c.Flags().BoolVar(&force, "force", false, "enrol anew, giving up the identity this device has")
	c.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to try")
	o.addConfig(c.Flags())
	o.addStateDir(c.Flags())
	o.addTransport(c.Flags())
	addOutput(c, &output)
	return c
}

// activationCode is a code that is whole. It is a secret: see String.
type activationCode struct{ text, pin string }

// String hides the secret.
func (activationCode) String() string { return "[activation code]" }

// readCode finds the activation code and sees whether it is one.
func readCode(t terminal, flag string) (activationCode, error) {
	text := flag
	switch flag {
	case "":
		text = os.Getenv("BELAY_ACTIVATION")
	case "-":
		b, err := io.ReadAll(io.LimitReader(t.in, maxCodeInput))
		if err != nil {
			return activationCode{}, fmt.Errorf("read activation code from standard input: %w", err)
		}
		text = string(b)
	}
	if strings.TrimSpace(text) == "" {
		return activationCode{}, usageError{errors.New("no activation code: pass --activation CODE, or - to read it from standard input, or set BELAY_ACTIVATION; make one with: belay activation create")}
	}
	code, err := wire.ParseActivationCode(text)
	if err != nil {
		return activationCode{}, usageError{err}
	}
	return activationCode{text, code.Pin.String()}, nil
}

// enroll makes the device an instance, or finds that it is one already.
func enroll(ctx context.Context, t terminal, cfg config.Config, code activationCode, force bool) (identity.Instance, bool, error) {
	if force {
		if err := noAgentHas(cfg.StateDir); err != nil {
			return identity.Instance{}, false, err
		}
	} else if i, done, err := enrolledAlready(cfg.StateDir, code); done || err != nil {
		return i, done, err
	}
	facts, err := system.Read(ctx, "/", factOptions(cfg))
	if err != nil {
		return identity.Instance{}, false, err
	}
	begun, err := identity.Begin(cfg.StateDir, code.pin, func() ([]byte, error) {
		key, err := carrier.NewKey()
		if err != nil {
			return nil, err
		}
		return carrier.EncodeKey(key)
	})
	if err != nil {
		return identity.Instance{}, false, err
	}
	if !force { // another enrolment may have ended since we looked
		if i, done, err := enrolledAlready(cfg.StateDir, code); done || err != nil {
			begun.Discard()
			return i, done, err
		}
	}
	key, err := carrier.ParseKey(begun.Key)
	if err != nil {
		begun.Reject()
		return identity.Instance{}, false, fmt.Errorf("the key kept for this enrolment is damaged and was removed, run the command again: %w", err)
	}
	cert, err := carrier.SelfSigned(key)
	if err != nil {
		begun.Discard()
		return identity.Instance{}, false, err
	}
	proxy, err := proxyOf(cfg)
	if err != nil {
		begun.Discard()
		return identity.Instance{}, false, err
	}
	e, err := ask(ctx, t, link.EnrollConfig{
		Code: code.text, Key: key, Transport: cfg.Transport, Proxy: proxy,
		HashedMachineID: facts.MachineID, AgentVersion: agentVersion(), Hostname: facts.Hostname,
		Facts: describe(facts, cfg),
	})
	if err != nil {
		return identity.Instance{}, false, settle(begun, err)
	}
	i := identity.Instance{
		ID: e.InstanceID, Cluster: e.Cluster, Pin: e.Pin.String(),
		Addresses: e.Addresses, KeyFingerprint: wire.Fingerprint(cert.Leaf),
	}
	if err := begun.Commit(i); err != nil {
		return identity.Instance{}, false, fmt.Errorf("the control plane took this device as %s, but that could not be recorded: %w: see to it and run the same command again", i.ID, err)
	}
	return i, false, nil
}

// Pauses between two questions to a control plane that has not decided.
const (
	firstPause = 500 * time.Millisecond
	lastPause  = 10 * time.Second
)

// ask asks until the control plane has decided, nobody can be reached, or ctx
// ends. Asking again is harmless: the same key is the same instance.
func ask(ctx context.Context, t terminal, cfg link.EnrollConfig) (link.Enrollment, error) {
	var lost error // the last answer that may have been a yes
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		e, err := link.Enroll(ctx, cfg)
		if err == nil {
			return e, nil
		}
		if errors.Is(err, link.ErrUndecided) {
			lost = err
		} else if lost == nil && !busy(err) || errors.Is(err, link.ErrRefused) && !busy(err) {
			return link.Enrollment{}, err
		}
		wait := pause
		var told *wire.Error
		if errors.As(err, &told) && told.RetryAfter > 0 {
			wait = told.RetryAfter
		}
		if deadline, ok := ctx.Deadline(); ctx.Err() != nil || ok && time.Until(deadline) < wait {
			if lost != nil {
				err = lost
			}
			return link.Enrollment{}, err
		}
		fmt.Fprintf(t.err, "belay-agent: %v: trying again in %s\n", err, wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// busy tells refusals that another try may change.
func busy(err error) bool {
	switch wire.CodeOf(err) {
	case wire.CodeOverloaded, wire.CodeUnavailable, wire.CodeInternal, wire.CodeShutdown:
		return true
	}
	return false
}

// settle leaves on disk what the failure calls for.
func settle(begun *identity.Enrolment, err error) error {
	switch {
	case errors.Is(err, link.ErrUndecided):
		begun.Keep()
		return fmt.Errorf("%w: run the same command again, it takes no second use of the activation", err)
	case wire.CodeOf(err) == wire.CodePrecondition: // the key belongs to a deregistered instance
		begun.Reject()
		return fmt.Errorf("enrolment refused: %w: run the command again to enrol with a new key", err)
	case errors.Is(err, link.ErrRefused):
		err = fmt.Errorf("enrolment refused: %w", err)
	}
	begun.Discard()
	return err
}

// enrolledAlready tells whether there is nothing to do, or an error when the
// device belongs to another control plane.
func enrolledAlready(stateDir string, code activationCode) (identity.Instance, bool, error) {
	id, err := identity.Load(stateDir)
	switch {
	case errors.Is(err, identity.ErrNotEnrolled):
		return identity.Instance{}, false, nil
	case err != nil:
		return identity.Instance{}, false, err
	case id.Pin != code.pin:
		return identity.Instance{}, false, fmt.Errorf("this device is enrolled with another control plane, at %s, as %s: stop the agent and use --force to leave that one, or choose another --state-dir",
			strings.Join(id.Addresses, ", "), id.ID)
	}
	return id.Instance, true, nil
}

// noAgentHas refuses to change an identity under a running agent's feet.
func noAgentHas(stateDir string) error {
	f, err := os.Open(filepath.Join(stateDir, "lock"))
	if err != nil {
		return nil // no agent was ever run on it
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("an agent is running on %s: stop it before enrolling anew", stateDir)
	}
	return nil
}

func factOptions(c config.Config) system.Options {
	return system.Options{Reserve: system.Reserve{CPUPercent: c.Reserve.CPUPercent, MemoryMiB: c.Reserve.MemoryMiB}}
}

// describe is what the control plane is told of the device, plugins apart.
func describe(f system.Facts, c config.Config) *wire.Facts {
	w := f.Wire(c.Attributes)
	for _, p := range c.ReservedPorts {
		for _, protocol := range []string{"tcp", "udp"} {
			if p.Protocol == "" || p.Protocol == protocol {
				w.ReservedPorts = append(w.ReservedPorts, &wire.Port{Protocol: protocol, Port: uint32(p.Port)})
			}
		}
	}
	return w
}
