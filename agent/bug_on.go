//go:build belay_bug

package agent

import (
	"os"
	"strings"
	"sync"
)

var planted = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/run/belay-bug")
	return strings.TrimSpace(string(b))
})

func bug(name string) bool { return planted() == name }
