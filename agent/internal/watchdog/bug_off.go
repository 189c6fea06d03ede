//go:build !belay_bug

package watchdog

import "time"

// hasten is for programs with a planted bug: a test does not wait an hour.
func hasten(d time.Duration, _ int) time.Duration { return d }
