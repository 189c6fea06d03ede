package host

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

func validName(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// ignored says which entries of the plugin directory are no plugins and no
// mistake either.
func ignored(e fs.DirEntry) bool {
	name := e.Name()
	if e.IsDir() || strings.HasPrefix(name, ".") {
		return true
	}
	for _, suffix := range []string{".dpkg-new", ".dpkg-tmp", ".dpkg-old", "~"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return false
}

// identity tells one content of a file from the next.
type identity struct {
	dev, ino uint64
	size     int64
	changed  time.Time
	mode     fs.FileMode
}

// identify follows symbolic links.
func identify(path string) (identity, error) {
	st, err := os.Stat(path)
	if err != nil {
		return identity{}, err
	}
	id := identity{size: st.Size(), changed: st.ModTime(), mode: st.Mode()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(sys.Dev), sys.Ino
		id.changed = time.Unix(int64(sys.Ctim.Sec), int64(sys.Ctim.Nsec))
	}
	return id, nil
}

// checkTrust refuses executables that someone less trusted than the agent
// could have written: the file, the directory it really is in, and the plugin
// directory belong to root or to the agent's own user, and nobody else may
// write them. The groups of root and, for an agent without root, of its user
// are not somebody else: many systems give every user a group and umask 002.
func checkTrust(path string) error {
	op := "check plugin " + path
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return sdk.Errorf(sdk.Invalid, op, "%w", err)
	}
	for _, p := range []string{real, filepath.Dir(real), filepath.Dir(path)} {
		st, err := os.Stat(p)
		if err != nil {
			return sdk.Errorf(sdk.Invalid, op, "%w", err)
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			continue
		}
		if self := uint32(os.Geteuid()); sys.Uid != 0 && sys.Uid != self {
			return sdk.Errorf(sdk.Invalid, op, "%s belongs to user %d, not to root or to the agent's user %d", p, sys.Uid, self).
				WithHint("chown root:root " + p)
		}
		mode, strangers := st.Mode(), fs.FileMode(0o022)
		if sys.Gid == uint32(os.Getegid()) {
			strangers = 0o002
		}
		if mode.Perm()&strangers != 0 && !(mode.IsDir() && mode&fs.ModeSticky != 0) {
			return sdk.Errorf(sdk.Invalid, op, "%s has mode %04o: others than its owner may write it", p, mode.Perm()).
				WithHint("chmod go-w " + p)
		}
	}
	return nil
}

func checksum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
