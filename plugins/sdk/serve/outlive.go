package serve

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/belay-edge/belay/plugins/sdk/internal/handshake"
)

// OutliveKey names the environment variable in which the host says how a
// program leaves what is limited together with the plugin and ends with it: a
// list of files, with colons between them, each of which the program's process
// id, or 0 for its own, is to be written to. Unset: there is nothing to leave.
const OutliveKey = handshake.OutliveKey

// OutliveFiles are the files that OutliveKey lists.
func OutliveFiles() []string {
	var files []string
	for _, f := range filepath.SplitList(os.Getenv(OutliveKey)) {
		if f != "" {
			files = append(files, f)
		}
	}
	return files
}

// Outlive takes the calling process, which a plugin has started into a session
// of its own and with OutliveKey in its environment, out of what ends with the
// plugin and counts against the plugin's limits. A container's keeper calls it
// first of all; until then it may be killed with the plugin.
func Outlive() error {
	var all []error
	for _, f := range OutliveFiles() {
		all = append(all, os.WriteFile(f, []byte("0"), 0))
	}
	return errors.Join(all...)
}
