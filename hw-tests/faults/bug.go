package faults

import (
	"os"
)

// bugKey names the planted bug to run with; the binaries must be built with
// -tags belay_bug to have any.
const bugKey = "BELAY_BUG"

func planted() string { return os.Getenv(bugKey) }
