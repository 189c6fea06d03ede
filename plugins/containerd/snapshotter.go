package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	overlayfs = "overlayfs"
	native    = "native"
)

// chooseSnapshotter returns the configured snapshotter, or for "auto" the
// best one that works. It asks containerd until it knows, then no more.
func (r *Runtime) chooseSnapshotter(ctx context.Context) (string, error) {
	r.mu.Lock()
	known := r.snapshotter
	r.mu.Unlock()
	if known != "" {
		return known, nil
	}
	resp, err := r.client.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return "", err
	}
	roots := map[string]string{}
	for _, p := range resp.Plugins {
		if p.InitErr == nil {
			roots[p.ID] = p.Exports["root"]
		}
	}
	want := r.cfg.Snapshotter
	if want == "auto" {
		want = overlayfs
		root, ok := roots[overlayfs]
		if !ok {
			err = errors.New("containerd has it disabled")
		} else if root != "" {
			err = overlayWorks(root)
		}
		if err != nil {
			r.log.Warn("falling back to the native snapshotter: every container copies its image", "reason", err)
			want = native
		}
	}
	if _, ok := roots[want]; !ok {
		return "", sdk.Errorf(sdk.Unsupported, "", "containerd has no snapshotter %q", want).WithHint("set snapshotter to one that `ctr plugins ls` shows as ok")
	}
	r.mu.Lock()
	r.snapshotter, r.snapshots = want, roots[want]
	r.mu.Unlock()
	return want, nil
}

// overlayWorks mounts an overlay in a directory of the snapshotter's: some
// file systems and kernels cannot, and containerd notices only at first use.
func overlayWorks(root string) error {
	dir, err := os.MkdirTemp(root, "check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, d := range []string{"lower1", "lower2", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%[1]s/lower2:%[1]s/lower1,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	merged := filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount an overlay in %s: %w", root, err)
	}
	return unix.Unmount(merged, 0)
}
