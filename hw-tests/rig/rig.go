// Package rig starts the real daemons that tests and the demo need, each
// private to one directory and to loopback: a containerd of its own and an OCI
// registry. It knows nothing of package testing, so programs can use it too.
package rig

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// Missing says which programs a daemon needs and this machine lacks.
type Missing struct {
	Programs []string
}

func (m *Missing) Error() string {
	return fmt.Sprintf("not installed: %s (as root, run packaging/dev/setup.sh)", strings.Join(m.Programs, ", "))
}

// lookUp returns a *Missing naming those programs that are not in PATH.
func lookUp(programs ...string) error {
	var missing []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if missing != nil {
		return &Missing{Programs: missing}
	}
	return nil
}

var errNotYet = errors.New("not yet")
