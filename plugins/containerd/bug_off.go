//go:build !belay_bug

package containerd

// bug says whether a bug is planted, to see whether hw-tests/faults finds it.
// Only programs built with the tag belay_bug have any.
func bug(string) bool { return false }
