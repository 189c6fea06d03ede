package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// bridge connects containers to one bridge on the host through CNI plugins.
type bridge struct {
	name    string
	subnet  string
	binDirs []string
	list    *libcni.NetworkConfigList
	bare    *libcni.NetworkConfigList // of the same name, without port mappings
	listErr error
	netns   string // directory of bind mounts that hold network namespaces
	results string // directory of the plugins' answers

	turn    keyedMutex // one change at a time
	allowed bool       // has its firewall rules; guarded by turn
}

const ifName = "eth0"

// addresses outlive the run directory of any one agent, as the bridge does,
// but not a reboot.
const addressDir = "/run/belay-cni"

func newBridge(c Config, runDir string) *bridge {
	b := &bridge{name: c.Bridge.Name, subnet: c.Bridge.Subnet, binDirs: c.CNIBinDirs, netns: filepath.Join(runDir, "netns"), results: filepath.Join(runDir, "cni")}
	br := map[string]any{
		"type": "bridge", "bridge": c.Bridge.Name, "isGateway": true, "hairpinMode": true,
		"ipam": map[string]any{
			"type": "host-local", "dataDir": addressDir,
			"ranges": [][]map[string]string{{{"subnet": c.Bridge.Subnet}}},
			"routes": []map[string]string{{"dst": "0.0.0.0/0"}},
		},
	}
	if c.Bridge.MTU > 0 {
		br["mtu"] = c.Bridge.MTU
	}
	list := func(plugins ...map[string]any) *libcni.NetworkConfigList {
		conf, err := json.Marshal(map[string]any{"cniVersion": "0.4.0", "name": c.Bridge.Name, "plugins": plugins})
		if err != nil {
			b.listErr = err
			return nil
		}
		l, err := libcni.ConfListFromBytes(conf)
		b.listErr = errors.Join(b.listErr, err)
		return l
	}
	b.bare = list(br)
	b.list = list(br, map[string]any{"type": "portmap", "snat": true, "capabilities": map[string]bool{"portMappings": true}})
	return b
}

func (b *bridge) find(plugin string) string {
	for _, d := range b.binDirs {
		p := filepath.Join(d, plugin)
		if i, err := os.Stat(p); err == nil && i.Mode().IsRegular() && i.Mode()&0o111 != 0 {
			return p
		}
	}
	return ""
}

// usable says what is missing for the bridge network, if anything.
func (b *bridge) usable() error {
	if b.listErr != nil {
		return b.listErr
	}
	var missing []string
	for _, p := range []string{"bridge", "host-local", "portmap"} {
		if b.find(p) == "" {
			missing = append(missing, p)
		}
	}
	if missing != nil {
		return sdk.Errorf(sdk.Unsupported, "", "the bridge network needs the CNI plugins %s, which are not in %s", strings.Join(missing, ", "), strings.Join(b.binDirs, ", ")).
			WithHint("install containernetworking-plugins, or set cni_bin_dirs")
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		return sdk.Errorf(sdk.Unsupported, "", "the bridge network needs iptables").WithHint("install iptables")
	}
	return nil
}

func (b *bridge) path(id string) string { return filepath.Join(b.netns, id) }

// makeNetNS makes the container's network namespace with its loopback up.
func (b *bridge) makeNetNS(id string) (string, error) {
	if err := os.MkdirAll(b.netns, 0o700); err != nil {
		return "", err
	}
	if err := makeNamespace(b.path(id), unix.CLONE_NEWNET, "net", loopbackUp); err != nil {
		return "", fmt.Errorf("make the network namespace: %w", err)
	}
	return b.path(id), nil
}

// loopbackUp sets lo up in the calling thread's namespace.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(ifr))); e != 0 {
		return fmt.Errorf("set loopback up: %w", e)
	}
	return nil
}

// connect gives the namespace an address on the bridge and maps its ports.
func (b *bridge) connect(ctx context.Context, id string, ports []sdk.PortMapping) (ip string, err error) {
	err = b.change(ctx, func(p *programs) error {
		if err := b.allow(ctx, p); err != nil {
			return err
		}
		list := b.list
		if len(ports) == 0 {
			list = b.bare
		}
		res, err := b.cni(p).AddNetworkList(ctx, list, b.conf(id, ports))
		if err != nil {
			return err
		}
		r, err := types100.NewResultFromResult(res)
		if err != nil {
			return err
		}
		if len(r.IPs) == 0 {
			return errors.New("no address was given")
		}
		ip = r.IPs[0].Address.IP.String()
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("connect to the bridge network: %w", err)
	}
	return ip, nil
}

// allow lets the bridge's traffic through where a firewall's policy is to
// drop, and out under the host's address: three rules a bridge. CNI's own
// plugins can make such rules for every address, which takes ten runs of
// iptables a container, and leave them behind when an ADD is interrupted.
func (b *bridge) allow(ctx context.Context, p *programs) error {
	run := func(verb string, rule []string) error {
		_, err := p.run(ctx, "", "iptables", slices.Concat([]string{"-w", "10", "-t", rule[0], verb}, rule[1:])...)
		return err
	}
	rules := b.rules()
	if b.allowed && run("-C", rules[0]) == nil {
		return nil // else somebody has loaded other rules since
	}
	b.allowed = false
	for _, rule := range rules {
		if run("-C", rule) == nil {
			continue
		}
		if err := run("-I", rule); err != nil {
			return fmt.Errorf("let traffic of %s through the firewall: %w", b.name, err)
		}
	}
	b.allowed = true
	return nil
}

// rules are the bridge's own, each after the name of its table.
func (b *bridge) rules() [][]string {
	return [][]string{
		{"nat", "POSTROUTING", "-s", b.subnet, "!", "-d", "224.0.0.0/4", "!", "-o", b.name, "-j", "MASQUERADE"},
		{"filter", "FORWARD", "-i", b.name, "-j", "ACCEPT"},
		{"filter", "FORWARD", "-o", b.name, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "ACCEPT"},
	}
}

// release undoes makeNetNS and connect, whole or partly done, any number of
// times. The namespace is made first and goes last, so where there is none,
// there is nothing else.
func (b *bridge) release(ctx context.Context, id string, ports []sdk.PortMapping) error {
	path := b.path(id)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || bug("leaked-netns") {
		return nil
	}
	if isMount(path) {
		err := b.change(ctx, func(p *programs) error {
			// What DEL says does not tell whether anything is left: a
			// connection half made is a failure to it.
			said := b.cni(p).DelNetworkList(ctx, b.list, b.conf(id, ports))
			if err := b.sweep(ctx, p, id); err != nil {
				return errors.Join(err, said)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("disconnect from the bridge network: %w", err)
		}
	}
	// Both ends of the link go with the namespace.
	if err := unmount(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (b *bridge) conf(id string, ports []sdk.PortMapping) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: id, NetNS: b.path(id), IfName: ifName, CapabilityArgs: map[string]any{}}
	var maps []map[string]any
	for _, m := range ports {
		maps = append(maps, map[string]any{"hostPort": m.HostPort, "containerPort": m.ContainerPort, "protocol": m.Protocol, "hostIP": m.HostIP})
	}
	if maps != nil {
		rt.CapabilityArgs["portMappings"] = maps
	}
	return rt
}
