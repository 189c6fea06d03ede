package rig

import (
	"context"
	"path/filepath"
)

// StartControlAt is StartControl on an address that the caller has chosen, for
// control planes that are reached through a network.
func StartControlAt(ctx context.Context, bin Binaries, dir, address string, extra ...string) (*Control, error) {
	c := &Control{Bin: bin, Dir: filepath.Join(dir, "control"), logs: dir, Addr: address, args: extra}
	return c, c.Restart(ctx)
}
