package host

import (
	"context"

	"github.com/belay-edge/belay/plugins/sdk/internal/idle"
)

// GiveBackMemory returns memory to the kernel whenever the calling process
// has gone quiet, until ctx ends. Plugins do so by themselves; it is for the
// process that hosts them, once, beside its work.
func GiveBackMemory(ctx context.Context) { idle.Run(ctx) }

// Worked tells GiveBackMemory that a piece of work is done, so that it looks
// soon. Calls to plugins tell by themselves.
func Worked() { idle.Worked() }
