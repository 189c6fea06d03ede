package host

import (
	"context"

	"github.com/belay-edge/belay/plugins/sdk/internal/idle"
)

// GiveBackMemory returns memory to the kernel whenever the calling process
// has gone quiet, until ctx ends. Plugins do so by themselves; it is for the
// process that hosts them, once, beside its work.
func GiveBackMemory(ctx context.Context) { idle.Run(ctx, nil) }

// GiveBackMemoryAsked is GiveBackMemory for a process that watches its loops:
// this one receives from pulse whenever it waits.
func GiveBackMemoryAsked(ctx context.Context, pulse <-chan struct{}) { idle.Run(ctx, pulse) }

// Worked tells GiveBackMemory that a piece of work is done, so that it looks
// soon. Calls to plugins tell by themselves.
func Worked() { idle.Worked() }
