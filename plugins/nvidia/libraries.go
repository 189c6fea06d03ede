package nvidia

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// cudaLibraries is where images made for NVIDIA's runtime look for the
// driver's libraries: LD_LIBRARY_PATH has it in all that derive from its own.
const cudaLibraries = "/usr/local/nvidia/lib64"

// driverLibraries are the mounts of the driver's libraries: each at its own
// place, which images of the host's distribution search, and in
// cudaLibraries, which images made for GPUs do.
func driverLibraries(fs sysfs.FS, driver string, machine int32) ([]sdk.Mount, error) {
	b, ok := fs.BytesUpTo("/etc/ld.so.cache", 8<<20)
	if !ok {
		return nil, errors.New("find the driver's libraries: there is no /etc/ld.so.cache: run ldconfig")
	}
	cache, err := readCache(b)
	if err != nil {
		return nil, fmt.Errorf("find the driver's libraries in /etc/ld.so.cache: %w", err)
	}
	var mounts []sdk.Mount
	seen := map[string]bool{}
	for _, l := range cache {
		if !isWanted(l.soname) || machine != 0 && l.flags&0xff00 != machine || seen[l.soname] {
			continue
		}
		// Another driver's, of an update without a reboot, would not work.
		file, err := fs.Real(l.path)
		if err != nil || !strings.HasSuffix(file, ".so."+driver) {
			continue
		}
		seen[l.soname] = true
		for _, dir := range slices.Compact([]string{path.Dir(l.path), cudaLibraries}) {
			mounts = append(mounts, sdk.Mount{Type: "bind", Source: file, Target: path.Join(dir, l.soname), ReadOnly: true})
		}
	}
	if !seen["libcuda.so.1"] {
		return nil, fmt.Errorf("find the driver's libraries in /etc/ld.so.cache: no libcuda.so.1 of the driver %s: install its compute libraries, or run ldconfig", driver)
	}
	if smi := "/usr/bin/nvidia-smi"; fs.IsFile(smi) {
		mounts = append(mounts, sdk.Mount{Type: "bind", Source: smi, Target: smi, ReadOnly: true})
	}
	return mounts, nil
}

// Flags of cache entries for the machines there are drivers for: glibc's
// sysdeps/generic/ldconfig.h.
var machine = map[string]int32{"amd64": 0x0300, "arm64": 0x0a00}[runtime.GOARCH]

type cached struct {
	soname, path string
	flags        int32
}

// readCache reads what ldconfig wrote, in the format of glibc 2.2 and newer,
// which an older one may precede: a header, entries, and a table of strings.
func readCache(b []byte) ([]cached, error) {
	const (
		old, magic     = "ld.so-1.7.0\x00", "glibc-ld.so.cache1.1"
		oldEntry       = 12
		header, record = 48, 24
	)
	if bytes.HasPrefix(b, []byte(old)) && len(b) >= 16 {
		skip := (uint64(16) + oldEntry*uint64(binary.NativeEndian.Uint32(b[12:])) + 7) &^ 7
		if skip > uint64(len(b)) {
			return nil, errors.New("it is cut short")
		}
		b = b[skip:]
	}
	if !bytes.HasPrefix(b, []byte(magic)) || len(b) < header {
		return nil, errors.New("it is of no known format")
	}
	n := uint64(binary.NativeEndian.Uint32(b[20:]))
	if header+n*record > uint64(len(b)) {
		return nil, errors.New("it is cut short")
	}
	text := func(offset uint32) string {
		if uint64(offset) >= uint64(len(b)) {
			return ""
		}
		s, _, _ := bytes.Cut(b[offset:], []byte{0})
		return string(s)
	}
	var all []cached
	for i := range n {
		e := b[header+i*record:]
		all = append(all, cached{
			flags:  int32(binary.NativeEndian.Uint32(e)),
			soname: text(binary.NativeEndian.Uint32(e[4:])), path: text(binary.NativeEndian.Uint32(e[8:])),
		})
	}
	return all, nil
}
