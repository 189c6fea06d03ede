package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// confinement is what Stage is told to do, as JSON.
type confinement struct {
	Writable []string `json:"writable"` // directories; all else is read-only
}

// Stage makes this process one with few rights and then the executable: it is
// what the agent's own program runs as, in place of a plugin of the device
// profile. Its arguments are a confinement, the executable's path, and the
// executable's arguments. It only returns, with an exit code, when it failed.
//
// A detector reads /sys and asks drivers through device nodes. As root it owns
// those, so no capability is left to it, not even CAP_DAC_READ_SEARCH or
// CAP_SYS_RAWIO: nothing it is for needs one. It may write into its own
// directories and to character devices; what a kernel cannot hold it to is
// reported and not fatal.
func Stage(args []string) int {
	// Rights belong to threads: the one that gives them up must be the one
	// that becomes the plugin.
	goruntime.LockOSThread()
	status := os.NewFile(sdkhost.WrapStatus, "status")
	var c confinement
	if len(args) < 2 || json.Unmarshal([]byte(args[0]), &c) != nil {
		fmt.Fprintf(status, "%s %d start the stage: it is for the agent to run\n", sdkhost.WrapFailed, syscall.EINVAL)
		return 1
	}
	parent := os.Getppid()
	if n, err := syscall.Read(sdkhost.WrapGo, make([]byte, 1)); n != 1 || err != nil {
		return 1 // the host is gone
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"death with the agent", func() error { return dieWith(parent) }},
		{"no new privileges", func() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }},
		{"no capabilities", dropCapabilities},
		{"resource limits", setLimits},
		{"out of memory before the agent", func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte("500"), 0) }},
		{"read-only file system (Landlock)", func() error { return restrictFiles(c.Writable) }},
		{"closed descriptors", closeOnExec},
	} {
		if err := step.do(); err != nil {
			fmt.Fprintf(status, "%s %s: %v\n", sdkhost.WrapMissing, step.what, err)
		}
	}
	err := execve(args[1], args[1:])
	var code syscall.Errno
	if !errors.As(err, &code) {
		code = syscall.EINVAL
	}
	fmt.Fprintf(status, "%s %d run %s\n", sdkhost.WrapFailed, int(code), args[1])
	return 1
}

// execve waits out somebody who still has the executable open for writing.
func execve(path string, argv []string) error {
	for range 50 {
		if err := syscall.Exec(path, argv, os.Environ()); !errors.Is(err, syscall.ETXTBSY) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return syscall.ETXTBSY
}

func dieWith(parent int) error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	if os.Getppid() != parent {
		os.Exit(1) // it died before
	}
	return nil
}

// dropCapabilities empties the bounding set, so that root has none after
// execve, and the present sets.
func dropCapabilities() error {
	if os.Geteuid() != 0 {
		return nil // it has none and, without new privileges, gets none
	}
	for c := 0; c <= 63; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // past the kernel's last
		} else if err != nil {
			return err
		}
	}
	_ = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) // since 4.3
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

func setLimits() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 1024})
}

// closeOnExec leaves the plugin its standard streams only.
func closeOnExec() error {
	if unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) == nil {
		return nil
	}
	entries, err := os.ReadDir("/proc/self/fd") // before 5.11
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// writes are the ways to change a file system that the first version of
// Landlock knows; later versions add to them.
const writes = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
	unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
	unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK | unix.LANDLOCK_ACCESS_FS_MAKE_SYM

// restrictFiles allows writing below the directories and to character devices
// and nowhere else.
func restrictFiles(writable []string) error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch errno {
	case 0:
	case unix.ENOSYS:
		return errors.New("this kernel has none: it came with 5.13")
	case unix.EOPNOTSUPP:
		return errors.New("it is not enabled in this kernel: see lsm= on its command line")
	default:
		return errno
	}
	handled := uint64(writes)
	if version >= 2 {
		handled |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version >= 3 {
		handled |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	// The first field of landlock_ruleset_attr is all there was at first, and all
	// that is needed.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&handled)), unsafe.Sizeof(handled), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(fd))
	for _, dir := range writable {
		if err := allow(int(fd), dir, handled&^(unix.LANDLOCK_ACCESS_FS_MAKE_CHAR|unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK)); err != nil {
			return err
		}
	}
	for _, node := range characterDevices("/dev") {
		_ = allow(int(fd), node, unix.LANDLOCK_ACCESS_FS_WRITE_FILE) // it may have gone
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func allow(set int, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	rule := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(set), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("allow %s: %w", path, errno)
	}
	return nil
}

// characterDevices are the device nodes that are no disk and not the machine's
// memory. Directories of them, such as /dev/dri and /dev/bus/usb, are named as
// a whole, so that what is plugged in later is reached too; a new node in /dev
// itself is read-only until the plugin's next launch.
func characterDevices(dev string) []string {
	var found []string
	entries, _ := os.ReadDir(dev)
	for _, e := range entries {
		path := filepath.Join(dev, e.Name())
		switch name := e.Name(); {
		case e.Type()&fs.ModeCharDevice != 0 && name != "mem" && name != "kmem" && name != "port":
			found = append(found, path)
		case e.IsDir() && name != "shm" && name != "mqueue" && name != "hugepages" && name != "pts" && onlyCharacters(path, 0):
			found = append(found, path)
		}
	}
	return found
}

// onlyCharacters tells whether a directory holds nothing to write to but
// character devices.
func onlyCharacters(dir string, depth int) bool {
	entries, err := os.ReadDir(dir)
	if err != nil || depth > 4 {
		return false
	}
	for _, e := range entries {
		switch {
		case e.IsDir():
			if !onlyCharacters(filepath.Join(dir, e.Name()), depth+1) {
				return false
			}
		case e.Type()&fs.ModeCharDevice == 0 || strings.HasPrefix(e.Name(), "nvme"):
			return false
		}
	}
	return true
}
