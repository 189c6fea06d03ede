package hwtests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// runThere runs this suite on another machine: it brings itself and the built
// plugins there with scp, and takes them away again.
func runThere(address string) int {
	if err := there(address); err != nil {
		fmt.Fprintf(os.Stderr, "run the suite on %s: %v\n", address, err)
		return 1
	}
	return 0
}

// machines maps what uname says to what Go builds for.
var machines = map[string][]string{
	"x86_64": {"GOARCH=amd64"}, "aarch64": {"GOARCH=arm64"}, "armv7l": {"GOARCH=arm", "GOARM=6"}, "armv6l": {"GOARCH=arm", "GOARM=6"},
}

func there(address string) error {
	host, port := address, "22"
	if h, p, err := net.SplitHostPort(address); err == nil {
		host, port = h, p
	}
	options := []string{"-o", "BatchMode=yes", "-o", "ConnectTimeout=10"}
	ssh := func(command string) *exec.Cmd {
		return exec.Command("ssh", append(append([]string{}, options...), "-p", port, host, command)...)
	}
	if *binFlag == "" {
		return fmt.Errorf("no built plugins to bring: make build GOARCH=... BIN=bin-board, then -bin $PWD/bin-board")
	}
	out, err := ssh("uname -m && mktemp -d").Output()
	if err != nil {
		return fmt.Errorf("ask what it is: %w (ssh must log in without a password)", err)
	}
	words := strings.Fields(string(out))
	if len(words) != 2 || machines[words[0]] == nil || !strings.HasPrefix(words[1], "/") {
		return fmt.Errorf("it says %q: want x86_64, aarch64, armv7l or armv6l, and a directory", out)
	}
	dir := words[1]
	defer func() { _ = ssh("rm -rf -- '" + dir + "'").Run() }()

	work, err := os.MkdirTemp("", "belay-devices")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	files := []string{filepath.Join(work, "devices.test"), filepath.Join(work, "probe"), filepath.Join(*binFlag, "belay-plugins")}
	for _, args := range [][]string{{"test", "-c", "-o", files[0], "."}, {"build", "-o", files[1], "./probe"}} {
		cmd := exec.Command("go", args...)
		cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux"), machines[words[0]]...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	if nvidia := filepath.Join(*binFlag, "belay-plugin-nvidia"); exists(nvidia) {
		files = append(files, nvidia)
	}
	copying := exec.Command("scp", append(append(append(append([]string{}, options...), "-q", "-P", port), files...), host+":"+dir+"/")...)
	copying.Stderr = os.Stderr
	if err := copying.Run(); err != nil {
		return fmt.Errorf("bring the binaries: %w", err)
	}
	run := ssh(fmt.Sprintf(`cd '%s' && mkdir plugins && ln -s ../belay-plugins plugins/edgetpu && { [ ! -e belay-plugin-nvidia ] || ln -s ../belay-plugin-nvidia plugins/nvidia; } &&
		root=; [ "$(id -u)" -eq 0 ] || ! sudo -n true 2>/dev/null || root='sudo -n'
		$root ./devices.test -test.v -test.run '^(TestTarget|TestContainers.*)$' -target=local -bin . -probe ./probe -load %s`, dir, quote(*loadFlag)))
	run.Stdout, run.Stderr = os.Stdout, os.Stderr
	if err := run.Run(); err != nil {
		return fmt.Errorf("the suite there: %w", err)
	}
	return nil
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
