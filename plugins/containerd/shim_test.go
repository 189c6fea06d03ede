package containerd

import (
	"errors"
	"strings"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk"
)

func TestIsShim(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef-main-1"
	for _, r := range []struct {
		name, cmdline string
		want          bool
	}{
		{"ours", "/usr/bin/containerd-shim-runc-v2 -namespace belay -id " + id + " -address /run/c.sock", true},
		{"of another namespace", "/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -id " + id + " -address /run/c.sock", false},
		{"of the next attempt", "/usr/bin/containerd-shim-runc-v2 -namespace belay -id " + id + "2 -address /run/c.sock", false},
		{"talk about it", "grep " + id, false},
	} {
		t.Run(r.name, func(t *testing.T) {
			if got := isShim([]byte(strings.ReplaceAll(r.cmdline, " ", "\x00")+"\x00"), "belay", id); got != r.want {
				t.Errorf("isShim = %v, want %v", got, r.want)
			}
		})
	}
}

func TestForgottenBundle(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef-main-1"
	const path = "/run/containerd/io.containerd.runtime.v2.task/belay/" + id
	r := &Runtime{cfg: Config{Namespace: "belay"}}
	for message, want := range map[string]string{
		"failed to start shim: mkdir " + path + ": file exists":                         path,
		"failed to start shim: mkdir " + path + "2: file exists":                        "",
		"mkdir /run/other/" + id + ": file exists":                                      "",
		"mkdir " + strings.Replace(path, "belay", "k8s.io", 1) + ": file exists":        "",
		"mkdir /x/../io.containerd.runtime.v2.task/belay/../../" + id + ": file exists": "",
		"container \"" + id + "\": already exists":                                      "",
	} {
		if got := r.forgottenBundle(errors.New(message), id); got != want {
			t.Errorf("%s: %q, want %q", message, got, want)
		}
	}
}

// containerd 2 no longer ends what runc said with ": unknown".
func TestWhatRuncSays(t *testing.T) {
	const pre = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
	for _, r := range []struct {
		name, message string
		kind          sdk.ErrorKind
		hint          string
	}{
		{"no such program", `exec: "/nothing": stat /nothing: no such file or directory`, sdk.NotFound, "entryPoint"},
		{"not in PATH", `exec: "nothing": executable file not found in $PATH`, sdk.NotFound, "entryPoint"},
		{"not executable", `exec: "/etc/passwd": permission denied`, sdk.Invalid, "not an executable file"},
		{"a directory", `exec: "/etc": is a directory`, sdk.Invalid, "not an executable file"},
		{"another processor", `exec /workload: exec format error`, sdk.Invalid, "another processor"},
	} {
		t.Run(r.name, func(t *testing.T) {
			for version, suffix := range map[string]string{"1": ": unknown", "2": ""} {
				kind, hint := (&Runtime{}).classify(errors.New(pre + r.message + suffix))
				if kind != r.kind || !strings.Contains(hint, r.hint) {
					t.Errorf("containerd %s: %s, %q; want %s, %q", version, kind, hint, r.kind, r.hint)
				}
			}
		})
	}
}
