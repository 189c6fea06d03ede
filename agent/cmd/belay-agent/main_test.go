package main

import (
	"os"
	"testing"

	"github.com/belay-edge/belay/agent/internal/host"
)

// The agent under test runs itself, which is this binary, to confine plugins.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == stageArg {
		os.Exit(host.Stage(os.Args[2:]))
	}
	os.Exit(m.Run())
}
