package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"

	"github.com/belay-edge/belay/plugins/sdk"
)

// portTable keeps starts under way from taking the same host port. What has
// been started is known by the labels of its container.
type portTable struct {
	mu     sync.Mutex
	making map[string][]sdk.PortMapping // by container id
}

// checkPorts refuses mappings that can never work.
func checkPorts(network string, ports []sdk.PortMapping) error {
	if len(ports) > 0 && network != sdk.NetworkBridge {
		return sdk.Errorf(sdk.Invalid, "", "port mappings need the bridge network, this is %s", network)
	}
	for i, m := range ports {
		switch {
		case m.Protocol != "tcp" && m.Protocol != "udp":
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: protocol %q is neither tcp nor udp", i, m.Protocol)
		case m.ContainerPort < 1 || m.ContainerPort > 65535:
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: container port %d is out of range", i, m.ContainerPort)
		case m.HostPort < 1 || m.HostPort > 65535:
			return sdk.Errorf(sdk.Invalid, "", "port mapping %d: host port %d is out of range", i, m.HostPort)
		}
		if m.HostIP != "" {
			if _, err := netip.ParseAddr(m.HostIP); err != nil {
				return sdk.Errorf(sdk.Invalid, "", "port mapping %d: %q is not an address", i, m.HostIP)
			}
		}
		for _, o := range ports[:i] {
			if clash(m, o) {
				return taken(m, "this container maps it twice")
			}
		}
	}
	return nil
}

// clash tells whether two mappings want the same port of the host.
func clash(a, b sdk.PortMapping) bool {
	every := func(ip string) bool { return ip == "" || ip == "0.0.0.0" || ip == "::" }
	return a.Protocol == b.Protocol && a.HostPort == b.HostPort && (a.HostIP == b.HostIP || every(a.HostIP) || every(b.HostIP))
}

func taken(m sdk.PortMapping, by string) error {
	return sdk.Errorf(sdk.Conflict, "", "host port %d/%s is taken: %s", m.HostPort, m.Protocol, by).
		WithHint("use another host port, or 0 to have one chosen")
}

// reservePorts makes the host ports ours until the container's labels say so,
// or Conflict. Containers that have exited give theirs up.
func (r *Runtime) reservePorts(ctx context.Context, id string, ports []sdk.PortMapping) (release func(), err error) {
	if len(ports) == 0 {
		return func() {}, nil
	}
	held, err := r.snapshotAll(ctx, "labels.\""+labelPort+"0\"") // any owner: the host has one set of ports
	if err != nil {
		return nil, err
	}
	r.ports.mu.Lock()
	defer r.ports.mu.Unlock()
	for other, theirs := range r.ports.making {
		for _, m := range ports {
			for _, o := range theirs {
				if other != id && clash(m, o) {
					return nil, taken(m, "by container "+other)
				}
			}
		}
	}
	for _, c := range held {
		if c.id == id {
			continue
		}
		for _, m := range ports {
			for _, o := range c.container.Ports {
				if !clash(m, o) {
					continue
				}
				if c.container.State == sdk.StateExited && c.mine(r) {
					if err := r.bridge.release(ctx, c.id, c.container.Ports); err != nil {
						return nil, err
					}
					continue
				}
				if c.container.State != sdk.StateExited {
					return nil, taken(m, "by "+c.container.Attempt.String())
				}
			}
		}
	}
	for _, m := range ports {
		if err := bindable(m); err != nil {
			return nil, err
		}
	}
	if r.ports.making == nil {
		r.ports.making = map[string][]sdk.PortMapping{}
	}
	r.ports.making[id] = ports
	return func() {
		r.ports.mu.Lock()
		defer r.ports.mu.Unlock()
		delete(r.ports.making, id)
	}, nil
}

// bindable tries the port: a program on the host may have it.
func bindable(m sdk.PortMapping) error {
	addr := net.JoinHostPort(m.HostIP, strconv.Itoa(m.HostPort))
	var err error
	if m.Protocol == "udp" {
		var c net.PacketConn
		if c, err = net.ListenPacket("udp", addr); err == nil {
			return c.Close()
		}
	} else {
		var l net.Listener
		if l, err = net.Listen("tcp", addr); err == nil {
			return l.Close()
		}
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return taken(m, "by a program on this host")
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return sdk.Errorf(sdk.Invalid, "", "this host has no address %s", m.HostIP)
	}
	return fmt.Errorf("try host port %d/%s: %w", m.HostPort, m.Protocol, err)
}
