package serve

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hostOnly is a listener that only the host gets through: the process that
// started this one, directly or by a script, or this one itself. Whoever else
// can reach the socket is root too, and is told apart by mistake rather than
// malice: it would be served beside the host.
type hostOnly struct{ *net.UnixListener }

// Accept implements net.Listener.
func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := checkHost(c); err != nil {
			slog.Warn("refused a connection to the plugin's socket", "err", err)
			c.Close()
			continue
		}
		return c, nil
	}
}

func checkHost(c *net.UnixConn) error {
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
		return nil // a kernel or sandbox that does not tell
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("it is user %d's, not the host's", cred.Uid)
	}
	// Process 0 is one of another pid namespace, as the host is of a plugin in
	// a container.
	for pid := os.Getpid(); cred.Pid != 0 && pid != int(cred.Pid); {
		if pid = parentOf(pid); pid <= 0 {
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cred.Pid))
			return fmt.Errorf("it is process %d's (%s), which did not start this plugin", cred.Pid, strings.TrimSpace(string(name)))
		}
	}
	return nil
}

// parentOf is 0 when there is none that could be known.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name, in parentheses, may hold anything; state and parent follow.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}
