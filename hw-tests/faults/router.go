package faults

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// The addresses of a site: the device behind its router, the router's own
// outside, the cloud. They exist in the site's namespaces only.
const (
	deviceLAN  = "192.168.77.2"
	routerLAN  = "192.168.77.1"
	routerWAN  = "203.0.113.1"
	cloudAddr  = "203.0.113.10"
	domain     = "faults.test"
	routerNS   = "/run/netns/router"
	controlTCP = "7443"
)

// router is what stands between a device and the world: it translates
// addresses and answers for names.
type router struct {
	wire    *wire
	mute    atomic.Bool // answers no question for names
	binding int         // which outside address and ports are in use
	dns     net.PacketConn
}

func newRouter() (*router, error) {
	r := &router{wire: &wire{}}
	err := commands(
		"ip netns add router",
		"ip link add cloud0 type veth peer name wan0 netns router",
		"ip addr add "+cloudAddr+"/24 dev cloud0",
		"ip link set cloud0 up",
		"ip -n router link set lo up",
		"ip -n router addr add "+routerWAN+"/24 dev wan0",
		"ip -n router link set wan0 up",
	)
	if err != nil {
		return nil, err
	}
	// More outside addresses, for a provider that gives another every day.
	for i := 2; i <= 6; i++ {
		if err := commands(fmt.Sprintf("ip -n router addr add 203.0.113.%d/24 dev wan0", i)); err != nil {
			return nil, err
		}
	}
	if err := commands("ip netns exec router sysctl -qw net.ipv4.ip_forward=1"); err != nil {
		return nil, err
	}
	return r, r.translate()
}

// attach connects a device that has booted.
func (r *router) attach(d *device) error {
	if err := r.wire.connect(d.netns(), routerNS); err != nil {
		return err
	}
	if err := commands("ip -n router addr add "+routerLAN+"/24 dev lan0", "ip -n router link set lan0 up"); err != nil {
		return err
	}
	if r.dns == nil {
		if err := r.serveNames(); err != nil {
			return err
		}
	}
	for _, l := range []string{"ip addr add " + deviceLAN + "/24 dev eth0", "ip link set eth0 up", "ip route add default via " + routerLAN} {
		if out, err := d.inside(strings.Fields(l)...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", l, err, out)
		}
	}
	return nil
}

// translate puts the present binding into force.
func (r *router) translate() error {
	first := 20000 + 3000*(r.binding%10)
	address := fmt.Sprintf("203.0.113.%d", 1+r.binding%6)
	rules := fmt.Sprintf(`table ip nat {}
delete table ip nat
table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname "wan0" meta l4proto { tcp, udp } snat to %s:%d-%d
		oifname "wan0" snat to %s
	}
}
`, address, first, first+2999, address)
	nft := "/run/router.nft"
	if err := os.WriteFile(nft, []byte(rules), 0o600); err != nil {
		return err
	}
	return command("ip", "netns", "exec", "router", "nft", "-f", nft)
}

// rebind forgets every connection and translates from another address and
// other ports from now on.
func (r *router) rebind() error {
	r.binding++
	if err := r.translate(); err != nil {
		return err
	}
	return within(routerNS, forgetConnections)
}

// forgetConnections empties the connection tracking of this thread's network
// namespace, as conntrack -F does.
func forgetConnections() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const (
		ctnetlink = 1
		del       = 2
	)
	request := []byte{
		20, 0, 0, 0, // length
		del, ctnetlink, unix.NLM_F_REQUEST | unix.NLM_F_ACK, 0,
		1, 0, 0, 0, 0, 0, 0, 0, // sequence, port
		unix.AF_UNSPEC, 0, 0, 0, // family, version, resource
	}
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("empty the connection tracking: %w", err)
	}
	reply := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, reply, 0)
	if err != nil || n < 20 {
		return fmt.Errorf("empty the connection tracking: %d bytes of an answer: %w", n, err)
	}
	if code := -(int32(reply[16]) | int32(reply[17])<<8 | int32(reply[18])<<16 | int32(reply[19])<<24); code != 0 {
		return fmt.Errorf("empty the connection tracking: %w", syscall.Errno(code))
	}
	return nil
}

// serveNames answers every name below the domain with the cloud's address.
func (r *router) serveNames() error {
	return within(routerNS, func() (err error) {
		if r.dns, err = net.ListenPacket("udp4", "0.0.0.0:53"); err != nil {
			return err
		}
		go func() {
			buf := make([]byte, 1500)
			for {
				n, from, err := r.dns.ReadFrom(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil || r.mute.Load() {
					continue
				}
				if a, err := named(buf[:n]); err == nil {
					_, _ = r.dns.WriteTo(a, from)
				}
			}
		}()
		return nil
	})
}

// named answers one question.
func named(question []byte) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(question)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	known := strings.HasSuffix(strings.TrimSuffix(q.Name.String(), "."), "."+domain)
	h.Response, h.RecursionAvailable = true, true
	if !known {
		h.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, h)
	if err := errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers()); err != nil {
		return nil, err
	}
	if known && q.Type == dnsmessage.TypeA {
		a := dnsmessage.AResource{A: [4]byte(net.ParseIP(cloudAddr).To4())}
		if err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, a); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// close lets go of the line; the namespaces go with the harness.
func (r *router) close() error {
	r.wire.disconnect()
	if r.dns != nil {
		r.dns.Close()
	}
	// The link by itself: a namespace that is deleted goes later.
	return commands("ip link del cloud0", "ip netns del router")
}
