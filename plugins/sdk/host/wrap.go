package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// How a launch talks to the program in Options.Wrap. On WrapGo it reads one
// byte, when it may go on; the end of the file means the host is gone. On
// WrapStatus it writes lines and closes it by execve:
//
//	missing TEXT          a protection this machine cannot give
//	failed ERRNO STEP     the executable was not run
const (
	WrapGo     = 3
	WrapStatus = 4
)

// Words of WrapStatus.
const (
	WrapMissing = "missing"
	WrapFailed  = "failed"
)

// release lets a wrapper go on and waits until it has become the executable.
func (p *process) release(tellGo, status *os.File) error {
	if _, err := tellGo.Write([]byte{1}); err != nil {
		return fmt.Errorf("let the wrapper go on: %w", err)
	}
	lines := bufio.NewScanner(io.LimitReader(status, 16<<10))
	for lines.Scan() {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case WrapMissing:
			p.mu.Lock()
			p.lacks = append(p.lacks, rest)
			p.mu.Unlock()
		case WrapFailed:
			code, step, _ := strings.Cut(rest, " ")
			n, err := strconv.Atoi(code)
			if err != nil || n <= 0 {
				return errors.New("the wrapper failed: " + rest)
			}
			return fmt.Errorf("%s: %w", step, syscall.Errno(n))
		}
	}
	return nil // what ended it otherwise is told by its exit
}

func (p *process) missing() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.lacks...)
}
