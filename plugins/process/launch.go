package process

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// basePath is what a program finds when its definition gives no PATH.
const basePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// rlimits by their names in task definitions, as numbers of Linux's
// asm-generic; MIPS and SPARC, which differ, are not built for.
var rlimits = map[string]int{
	"cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7,
	"memlock": 8, "as": 9, "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}

// unsupported lists what a spec asks for that a program of the host cannot
// have, by the names of the contract.
func unsupported(req sdk.StartRequest) []string {
	s := req.Spec
	var names []string
	for _, f := range []struct {
		set  bool
		name string
	}{
		{req.Network != "" && req.Network != sdk.NetworkHost, "network mode " + req.Network},
		{s.Image != "" || s.Digest != "", "image"},
		{s.Hostname != "", "hostname"},
		{len(s.Mounts) > 0, "mounts"},
		{len(s.Devices) > 0, "devices"},
		{len(s.CDIDevices) > 0, "CDI devices"},
		{len(s.Hooks) > 0, "hooks"},
		{len(s.AdditionalGIDs) > 0, "additional groups"},
		{len(s.CapabilitiesAdd) > 0 || len(s.CapabilitiesDrop) > 0, "capabilities"},
		{s.Privileged, "privileged"},
		{s.ReadOnlyRoot, "read-only root"},
		{len(s.DNSServers) > 0 || len(s.DNSSearch) > 0, "DNS settings"},
		{len(s.ExtraHosts) > 0, "extra hosts"},
		{s.Terminal, "terminal"},
		{s.StdinOpen, "open stdin"},
		{s.ShmBytes > 0, "size of /dev/shm"},
		{len(s.Sysctls) > 0, "sysctls"},
	} {
		if f.set {
			names = append(names, f.name)
		}
	}
	for _, o := range s.SecurityOptions {
		if o != "no-new-privileges" && o != "no-new-privileges:true" {
			names = append(names, "security option "+o)
		}
	}
	for _, p := range s.Ports {
		if p.HostPort != 0 && p.HostPort != p.ContainerPort {
			names = append(names, fmt.Sprintf("mapping of host port %d to %d", p.HostPort, p.ContainerPort))
		}
	}
	return names
}

// plan checks a request against this host and turns it into a launch file. It
// changes nothing.
func plan(op string, req sdk.StartRequest) ([]record.Field, []sdk.PortMapping, error) {
	if names := unsupported(req); len(names) > 0 {
		return nil, nil, sdk.Errorf(sdk.Unsupported, op, "the process runtime has no %s", strings.Join(names, ", ")).
			WithHint("remove it from the container definition or use a container runtime")
	}
	s := req.Spec
	argv := append(append([]string{}, s.EntryPoint...), s.Command...)
	if len(argv) == 0 || !filepath.IsAbs(argv[0]) {
		return nil, nil, sdk.Errorf(sdk.Invalid, op, "command %q does not begin with the absolute path of a program", argv)
	}
	if s.WorkingDir != "" && !filepath.IsAbs(s.WorkingDir) {
		return nil, nil, sdk.Errorf(sdk.Invalid, op, "working directory %q is not an absolute path", s.WorkingDir)
	}
	for _, v := range append([]string{s.WorkingDir, req.Stdout, req.Stderr}, argv...) {
		if strings.ContainsRune(v, 0) {
			return nil, nil, sdk.Errorf(sdk.Invalid, op, "%q holds a NUL byte", v)
		}
	}
	id, err := lookupIdentity(op, s.User)
	if err != nil {
		return nil, nil, err
	}
	var f []record.Field
	add := func(k, v string) { f = append(f, record.Field{Key: k, Value: v}) }
	for _, a := range argv {
		add(record.Arg, a)
	}
	env, err := environment(id.home, s.Env)
	if err != nil {
		return nil, nil, sdk.Errorf(sdk.Invalid, op, "%w", err)
	}
	for _, e := range env {
		add(record.Env, e)
	}
	if s.WorkingDir != "" {
		add(record.Dir, s.WorkingDir)
	}
	if id.change {
		add(record.UID, strconv.Itoa(id.uid))
		add(record.GID, strconv.Itoa(id.gid))
		add(record.Groups, strings.Trim(fmt.Sprint(id.groups), "[]"))
	}
	for _, u := range s.Ulimits {
		n, ok := rlimits[u.Name]
		if !ok || u.Soft > u.Hard {
			return nil, nil, sdk.Errorf(sdk.Invalid, op, "ulimit %s %d:%d: unknown name, or soft above hard", u.Name, u.Soft, u.Hard)
		}
		add(record.Rlimit, fmt.Sprintf("%d:%d:%d", n, u.Soft, u.Hard))
	}
	if len(s.SecurityOptions) > 0 {
		add(record.NoNewPriv, "1")
	}
	for key, path := range map[string]string{record.Out: req.Stdout, record.Err: req.Stderr} {
		if !filepath.IsAbs(path) {
			return nil, nil, sdk.Errorf(sdk.Invalid, op, "output path %q is not absolute", path)
		}
		add(key, path)
	}
	ports, err := bindable(op, s.Ports)
	return f, ports, err
}

// environment is the clean base and the definition's own; the last of a name
// wins, in the place of the first. Its errors show no value: it may be secret.
func environment(home string, own []string) ([]string, error) {
	var env []string
	at := map[string]int{}
	for _, e := range append([]string{"PATH=" + basePath, "HOME=" + home}, own...) {
		name, value, ok := strings.Cut(e, "=")
		if !ok || name == "" {
			return nil, errors.New("an environment entry is not NAME=value")
		}
		if strings.ContainsRune(name, 0) || strings.ContainsRune(value, 0) {
			return nil, fmt.Errorf("environment variable %q holds a NUL byte", name)
		}
		if i, seen := at[name]; seen {
			env[i] = e
			continue
		}
		at[name] = len(env)
		env = append(env, e)
	}
	return env, nil
}

// identity is who a program runs as.
type identity struct {
	uid, gid int
	groups   []int
	home     string
	change   bool // away from who we are
}

// lookupIdentity reads uid, uid:gid, name or name:group. A group that is given
// is the only one; otherwise the user's own, as login would set them.
func lookupIdentity(op, spec string) (identity, error) {
	self := identity{uid: os.Geteuid(), gid: os.Getegid(), home: "/"}
	if u, err := user.LookupId(strconv.Itoa(self.uid)); err == nil && u.HomeDir != "" {
		self.home = u.HomeDir
	}
	if spec == "" {
		return self, nil
	}
	name, group, hasGroup := strings.Cut(spec, ":")
	id := identity{home: "/", change: true}
	u, err := user.Lookup(name)
	if n, nerr := strconv.ParseUint(name, 10, 31); nerr == nil {
		id.uid = int(n)
		u, err = user.LookupId(name)
	} else if err != nil {
		return id, sdk.Errorf(sdk.Invalid, op, "user %q: %w", name, err)
	}
	if err == nil {
		id.uid, _ = strconv.Atoi(u.Uid)
		id.gid, _ = strconv.Atoi(u.Gid)
		id.home = u.HomeDir
		if groups, gerr := u.GroupIds(); gerr == nil && !hasGroup {
			for _, g := range groups {
				n, _ := strconv.Atoi(g)
				id.groups = append(id.groups, n)
			}
		}
	}
	if hasGroup {
		n, err := strconv.ParseUint(group, 10, 31)
		if err != nil {
			g, gerr := user.LookupGroup(group)
			if gerr != nil {
				return id, sdk.Errorf(sdk.Invalid, op, "group %q: %w", group, gerr)
			}
			n, _ = strconv.ParseUint(g.Gid, 10, 31)
		}
		id.gid, id.groups = int(n), []int{int(n)}
	}
	if self.uid != 0 {
		if id.uid != self.uid || hasGroup && id.gid != self.gid {
			return id, sdk.Errorf(sdk.Unsupported, op, "user %q: changing user takes root", spec).
				WithHint("run the agent as root or leave the user out")
		}
		id.change = false
	}
	return id, nil
}

// bindable checks that no one else has the ports. The program binds them
// itself, on the host's network: the mapping is only a promise.
func bindable(op string, ports []sdk.PortMapping) ([]sdk.PortMapping, error) {
	var bound []sdk.PortMapping
	for _, p := range ports {
		if p.ContainerPort < 1 || p.ContainerPort > 65535 {
			return nil, sdk.Errorf(sdk.Invalid, op, "port %d is not 1 to 65535", p.ContainerPort)
		}
		if p.HostIP != "" && net.ParseIP(p.HostIP) == nil {
			return nil, sdk.Errorf(sdk.Invalid, op, "host address %q is not an IP address", p.HostIP)
		}
		addr := net.JoinHostPort(p.HostIP, strconv.Itoa(p.ContainerPort))
		var err error
		switch p.Protocol {
		case "tcp", "":
			var l net.Listener
			if l, err = net.Listen("tcp", addr); err == nil {
				err = l.Close()
			}
		case "udp":
			var c net.PacketConn
			if c, err = net.ListenPacket("udp", addr); err == nil {
				err = c.Close()
			}
		default:
			return nil, sdk.Errorf(sdk.Invalid, op, "protocol %q is not tcp or udp", p.Protocol)
		}
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, sdk.Errorf(sdk.Conflict, op, "host port %d is taken: %w", p.ContainerPort, err)
		}
		p.HostPort = p.ContainerPort
		bound = append(bound, p)
	}
	return bound, nil
}

// startError says in the contract's words why execve was not reached.
func startError(op, program, dir, step string, e syscall.Errno) error {
	switch {
	case step == "execve" && e == syscall.ENOENT:
		if st, err := os.Stat(program); err == nil && st.Mode().IsRegular() {
			return sdk.Errorf(sdk.NotFound, op, "%s is there but what it needs to run is not: its interpreter or loader: %w", program, e)
		}
		return sdk.Errorf(sdk.NotFound, op, "no program %s: %w", program, e)
	case step == "execve" && e == syscall.ENOTDIR:
		return sdk.Errorf(sdk.NotFound, op, "no program %s: %w", program, e)
	case step == "execve" && (e == syscall.EACCES || e == syscall.EPERM):
		return sdk.Errorf(sdk.Invalid, op, "%s may not be executed: %w", program, e).WithHint("check its mode, its directories and noexec mounts")
	case step == "execve" && e == syscall.ENOEXEC:
		return sdk.Errorf(sdk.Invalid, op, "%s is no program for this machine: %w", program, e)
	case step == "execve" && e == syscall.E2BIG:
		return sdk.Errorf(sdk.Invalid, op, "command and environment are too long: %w", e)
	case step == "chdir":
		return sdk.Errorf(sdk.Invalid, op, "working directory %s: %w", dir, e)
	case e == syscall.ENOMEM || e == syscall.EAGAIN || e == syscall.ENOSPC || e == syscall.EMFILE || e == syscall.ENFILE || e == syscall.EDQUOT:
		return sdk.Errorf(sdk.Exhausted, op, "%s: %w", step, e)
	case step == "setrlimit" && e == syscall.EPERM:
		return sdk.Errorf(sdk.Unsupported, op, "ulimits: raising a hard limit takes root: %w", e)
	case strings.HasPrefix(step, "open "):
		return sdk.Errorf(sdk.Invalid, op, "%s: %w", step, e)
	}
	return sdk.Errorf(sdk.Internal, op, "%s: %w", step, e)
}

// sortOut gives an error from below its kind.
func sortOut(op string, err error) error {
	var known *sdk.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE),
		errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EAGAIN):
		return sdk.Errorf(sdk.Exhausted, op, "%w", err)
	case errors.Is(err, fs.ErrPermission):
		return sdk.Errorf(sdk.Internal, op, "%w", err).WithHint("check the owner of the state directory")
	}
	return sdk.Errorf(sdk.KindOf(err), op, "%w", err)
}
