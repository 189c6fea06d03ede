package rig

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Netns is a network namespace with one link to the machine, for devices
// whose link is to be cut. Needs root.
type Netns struct {
	Name string
	// Here and There are the addresses of the two ends, IPv4.
	Here, There string
	link        string
}

// NewNetns makes namespace name (at most 10 bytes) with a link of its own
// addressed from 10.SUBNET.0.0/24.
func NewNetns(name string, subnet int) (*Netns, error) {
	n := &Netns{Name: name, Here: fmt.Sprintf("10.%d.0.1", subnet), There: fmt.Sprintf("10.%d.0.2", subnet), link: "v" + name}
	inside := append(n.Within(), "ip")
	for _, args := range [][]string{
		{"ip", "netns", "add", name},
		{"ip", "link", "add", n.link, "type", "veth", "peer", "name", "uplink", "netns", name},
		{"ip", "address", "add", n.Here + "/24", "dev", n.link},
		{"ip", "link", "set", n.link, "up"},
		append(inside, "address", "add", n.There+"/24", "dev", "uplink"),
		append(inside, "link", "set", "lo", "up"),
		append(inside, "link", "set", "uplink", "up"),
		append(inside, "route", "add", "default", "via", n.Here),
	} {
		if err := command(args); err != nil {
			_ = n.Close()
			return nil, err
		}
	}
	return n, nil
}

// Within is the beginning of a command line that runs in the namespace. Mounts
// stay those of the machine: "ip netns exec" would hide the cgroups.
func (n *Netns) Within() []string { return []string{"nsenter", "--net=/run/netns/" + n.Name} }

// Link is the machine's end of the link.
func (n *Netns) Link() string { return n.link }

// Forward makes a server of the machine reachable under the same address
// inside, loopback included, until the listener is closed.
func (n *Netns) Forward(address string) (io.Closer, error) {
	type listening struct {
		ln  net.Listener
		err error
	}
	made := make(chan listening)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and the
		// namespace with it. The socket stays where it was made.
		runtime.LockOSThread()
		f, err := os.Open("/run/netns/" + n.Name)
		if err == nil {
			defer f.Close()
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		}
		var ln net.Listener
		if err == nil {
			ln, err = net.Listen("tcp", address)
		}
		made <- listening{ln, err}
	}()
	m := <-made
	if m.err != nil {
		return nil, fmt.Errorf("listen on %s in %s: %w", address, n.Name, m.err)
	}
	go func() {
		for {
			in, err := m.ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", address)
				if err != nil {
					return
				}
				defer out.Close()
				go func() {
					_, _ = io.Copy(out, in)
					_ = out.(*net.TCPConn).CloseWrite()
				}()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
	return m.ln, nil
}

// Cut drops everything both ways without a word, as a radio link does; Heal
// ends that.
func (n *Netns) Cut() error {
	for _, args := range [][]string{{"-I", "INPUT", "-i", "uplink", "-j", "DROP"}, {"-I", "OUTPUT", "-o", "uplink", "-j", "DROP"}} {
		if err := command(append(n.Within(), append([]string{"iptables", "-w"}, args...)...)); err != nil {
			return err
		}
	}
	return nil
}

// Heal ends Cut.
func (n *Netns) Heal() error {
	for _, chain := range []string{"OUTPUT", "INPUT"} {
		if err := command(append(n.Within(), "iptables", "-w", "-F", chain)); err != nil {
			return err
		}
	}
	return nil
}

// Close removes the namespace and the link.
func (n *Netns) Close() error {
	if err := command([]string{"ip", "netns", "delete", n.Name}); err != nil {
		return err
	}
	_ = exec.Command("ip", "link", "delete", n.link).Run() // went with the namespace, or will
	return nil
}

func command(args []string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
