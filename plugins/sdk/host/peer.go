package host

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// checkPeer makes sure that what listens on the socket is the process that was
// started, or one of its descendants (a script's interpreter, say), as the
// user it was started as.
func (p *Plugin) checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the plugin's socket is served by user %d, not by the user %d it was started as", cred.Uid, os.Geteuid())
	}
	if !descends(int(cred.Pid), p.proc.pid()) {
		return fmt.Errorf("the plugin's socket is served by process %d, which is neither process %d nor a descendant of it", cred.Pid, p.proc.pid())
	}
	return nil
}

// descends tells whether pid is ancestor or has it above itself. Process 0 is
// one the kernel cannot name to us, being of another pid namespace: nobody but
// a descendant could have made a socket in our directory from there.
func descends(pid, ancestor int) bool {
	for range 32 {
		switch pid {
		case ancestor, 0:
			return true
		case 1:
			return false
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		// The name, in parentheses, may hold anything; state and parent follow.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(fields) < 2 {
			return false
		}
		if pid, err = strconv.Atoi(fields[1]); err != nil || pid == 0 {
			return false
		}
	}
	return false
}
