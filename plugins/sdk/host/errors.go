package host

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Why a plugin could not be launched: errors.Is finds these in what Launch
// returns. The kind of the error says whether trying again can help: Invalid
// means not before the file or its configuration changes.
var (
	ErrNotExecutable = errors.New("not executable")
	ErrNotPlugin     = errors.New("not a plugin")
	ErrExited        = errors.New("exited before it was ready")
	ErrTimeout       = errors.New("not ready in time")
	ErrVersion       = errors.New("speaks another protocol version")
	ErrName          = errors.New("has another name")
	ErrConfig        = errors.New("configuration does not fit its options")
	ErrGarbage       = errors.New("does not speak the plugin protocol")
)

// ErrNonsense is in the error of a call whose answer breaks the contract.
var ErrNonsense = errors.New("the answer breaks the contract")

// cut bounds what a plugin says in words.
func cut(s string) string {
	if len(s) <= sdk.MaxReason {
		return s
	}
	return strings.ToValidUTF8(s[:sdk.MaxReason], "") + "..."
}

// failed makes the error of a launch. sentinel is one of the above.
func failed(kind sdk.ErrorKind, sentinel error, path, hint, format string, args ...any) error {
	return &sdk.Error{Kind: kind, Op: "launch plugin " + path, Message: fmt.Sprintf(format, args...), Hint: hint, Err: sentinel}
}

// isGarbage tells whether a call failed because of what the other side sent.
// gRPC has no better name for it than its words.
func isGarbage(err error) bool {
	for _, words := range []string{"error reading server preface", "frame too large", "http2: ", "connection error: desc = \"PROTOCOL_ERROR", "unexpected content-type", "malformed header"} {
		if strings.Contains(err.Error(), words) {
			return true
		}
	}
	return false
}

// checkFile refuses what can be told without running it.
func checkFile(path string) error {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return failed(sdk.NotFound, err, path, "", "there is no such file")
	case err != nil:
		return failed(sdk.Unavailable, err, path, "", "%v", err)
	case !st.Mode().IsRegular():
		return failed(sdk.Invalid, ErrNotExecutable, path, "put executables only into the plugin directory", "it is a %s, not a program", fileType(st.Mode()))
	case st.Mode()&0o111 == 0:
		return failed(sdk.Invalid, ErrNotExecutable, path, "chmod 755 it if it is meant to be a plugin", "the file is not executable (mode %04o)", st.Mode().Perm())
	}
	return nil
}

func fileType(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "named pipe"
	}
	return "special file"
}

// explainExec says why the kernel did not run the file.
func explainExec(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOEXEC):
		return failed(sdk.Invalid, ErrNotPlugin, path, "replace it with the plugin built for this device", "the file is not a program this device can run: %s", describe(path))
	case errors.Is(err, fs.ErrNotExist):
		return failed(sdk.Invalid, ErrNotPlugin, path, "build it statically, or install what it needs", "the file is there, but the interpreter or loader it asks for is not: %s", describe(path))
	case errors.Is(err, fs.ErrPermission):
		return failed(sdk.Invalid, ErrNotExecutable, path, "check the mode of the file and of the directories above it, and for a file system mounted noexec", "not allowed to run it: %v", err)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return failed(sdk.Exhausted, err, path, "", "cannot start a process: %v", err)
	}
	return failed(sdk.Unavailable, err, path, "", "cannot start it: %v", err)
}

// describe looks at what kind of file it is.
func describe(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head)
	head = head[:n]
	if n == 0 {
		return "it is empty"
	}
	if strings.HasPrefix(string(head), "#!") {
		line, _, _ := strings.Cut(string(head), "\n")
		return fmt.Sprintf("it is a script for %q", strings.TrimSpace(line[2:]))
	}
	if e, err := elf.NewFile(f); err == nil {
		s := "it is built for " + strings.ToLower(strings.TrimPrefix(e.Machine.String(), "EM_"))
		for _, p := range e.Progs {
			if p.Type == elf.PT_INTERP {
				if b, err := io.ReadAll(io.LimitReader(p.Open(), 256)); err == nil {
					s += fmt.Sprintf(", loader %q", strings.TrimRight(string(b), "\x00"))
				}
			}
		}
		return s + ", this device is " + runtime.GOARCH
	}
	for len(head) > 0 && !utf8.Valid(head) && len(head) > n-utf8.UTFMax {
		head = head[:len(head)-1] // a rune cut at the end of what was read
	}
	if utf8.Valid(head) && !strings.ContainsRune(string(head), 0) {
		return "it is a text file"
	}
	return "its format is unknown"
}
