//go:build belay_bug

package watchdog

import (
	"os"
	"strings"
	"sync"
	"time"
)

// stuck says that a bug is planted which the watchdogs are to find.
var stuck = sync.OnceValue(func() bool {
	b, _ := os.ReadFile("/run/belay-bug")
	switch strings.TrimSpace(string(b)) {
	case "stuck-loop", "stuck-reports", "deaf-transport":
		return true
	}
	return false
})

func hasten(d time.Duration, by int) time.Duration {
	if !stuck() {
		return d
	}
	return d / time.Duration(by)
}
