package containerd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/oci"
	rootpath "github.com/containerd/continuity/fs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// user resolves names in the image's own /etc/passwd and /etc/group. The
// client library could, but its way to the files brings text/template, whose
// calls by name make the linker keep every exported method of the binary: a
// fifth of it. root is the fresh snapshot of the image.
func (r *Runtime) user(p *plan, root []mount.Mount) oci.SpecOpts {
	name := p.q.Spec.User
	if name == "" {
		name = p.about.config.User
	}
	return func(ctx context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		if u, ok := r.known.user(p.image.Target.Digest, name); ok {
			s.Process.User = u
			return nil
		}
		return mount.WithReadonlyTempMount(ctx, root, func(root string) error {
			u, err := resolveUser(root, name)
			if err != nil {
				return sdk.Errorf(sdk.Invalid, "", "user %q: %w", name, err).WithHint("name a user of the image's /etc/passwd, or a number")
			}
			r.known.noteUser(p.image.Target.Digest, name, u)
			s.Process.User = u
			return nil
		})
	}
}

// resolveUser understands what an image's USER may be: user, uid, user:group,
// uid:gid, uid:group, user:gid; none is root. A number need not be known to
// the image, a name must.
func resolveUser(root, name string) (specs.User, error) {
	who, group, grouped := strings.Cut(name, ":")
	if strings.Contains(group, ":") {
		return specs.User{}, errors.New("want user, or user:group")
	}
	if who == "" {
		who = "0"
	}
	uid, isNumber, err := parseID(who)
	if err != nil {
		return specs.User{}, err
	}
	u := specs.User{UID: uid}
	login := ""
	err = eachEntry(root, "etc/passwd", 4, func(f []string) bool {
		id, ok1, err1 := parseID(f[2])
		gid, ok2, err2 := parseID(f[3])
		if err1 != nil || err2 != nil || !ok1 || !ok2 || f[0] != who && (!isNumber || id != uid) {
			return true
		}
		login, u.UID, u.GID = f[0], id, gid
		return false
	})
	if err != nil {
		return specs.User{}, err
	}
	if login == "" && !isNumber {
		return specs.User{}, errors.New("the image's /etc/passwd does not name it")
	}
	found := !grouped || group == ""
	if !found {
		if u.GID, found, err = parseID(group); err != nil {
			return specs.User{}, err
		}
	}
	var extra []uint32
	err = eachEntry(root, "etc/group", 3, func(f []string) bool {
		gid, ok, err := parseID(f[2])
		if err != nil || !ok {
			return true
		}
		if !found && f[0] == group {
			u.GID, found = gid, true
		}
		if len(f) > 3 && login != "" && f[0] != login && slices.Contains(strings.Split(f[3], ","), login) {
			extra = append(extra, gid)
		}
		return true
	})
	if err != nil {
		return specs.User{}, err
	}
	if !found {
		return specs.User{}, fmt.Errorf("the image's /etc/group does not name %q", group)
	}
	// The kernel checks the list alone where a set-group-id program gave the
	// group itself away: it belongs in.
	u.AdditionalGids = extra
	if !slices.Contains(extra, u.GID) {
		u.AdditionalGids = slices.Concat([]uint32{u.GID}, extra)
	}
	return u, nil
}

// parseID tells a number from a name. runc takes no more than 31 bits.
func parseID(s string) (id uint32, isNumber bool, err error) {
	n, err := strconv.Atoi(s)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && (n < 0 || n > math.MaxInt32):
		return 0, true, fmt.Errorf("%s is out of range: ids go from 0 to %d", s, math.MaxInt32)
	case err != nil:
		return 0, false, nil
	}
	return uint32(n), true, nil
}

// maxUserFile bounds what an image can make us read.
const maxUserFile = 10 << 20

// eachEntry calls f with the fields of each line that has at least so many,
// until f returns false. A file that is not there has none. Links lead where
// they would inside the root, never out of it.
func eachEntry(root, name string, fields int, f func([]string) bool) error {
	missing := func(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }
	path, err := rootpath.RootPath(root, name)
	if missing(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the image's /%s: %w", name, err)
	}
	within, err := filepath.Rel(root, path)
	if err != nil {
		return err
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer r.Close()
	file, err := r.OpenFile(within, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not hold us
	if missing(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the image's /%s: %w", name, err)
	}
	defer file.Close()
	if fi, err := file.Stat(); err != nil || !fi.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("the image's /%s is no regular file", name), err)
	}
	limited := &io.LimitedReader{R: file, N: maxUserFile}
	s := bufio.NewScanner(limited)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if entry := strings.Split(line, ":"); len(entry) >= fields && !strings.HasPrefix(line, "#") && !f(entry) {
			return nil
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read the image's /%s: %w", name, err)
	}
	if limited.N == 0 {
		return fmt.Errorf("the image's /%s is larger than %d MiB", name, maxUserFile>>20)
	}
	return nil
}
