package blackbox

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

func needRoot(t testing.TB) {
	if os.Getuid() != 0 {
		t.Skip("containerd needs root: run as root to test it")
	}
}

// TestImagesThatCannotBeHad: the task stops with the reason, the command fails.
func TestImagesThatCannotBeHad(t *testing.T) {
	needRoot(t)
	s := newSite(t, "containerd")
	h := host(t)
	port, err := rig.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		name, image string
		want        []string
	}{
		{"no-such-image", h.registry.Address + "/no/such:1", []string{"CannotPullContainerError", "no/such:1", "no such image"}},
		{"no-such-tag", strings.TrimSuffix(h.image("shell"), ":1") + ":none", []string{"CannotPullContainerError", ":none"}},
		{"wrong-architecture", h.image("foreign"), []string{"CannotPullContainerError", "s390x"}},
		{"wrong-credentials", h.locked.Address + "/shell:1", []string{"CannotPullContainerError", "credentials"}},
		{"not-a-reference", "UPPER CASE", []string{"UPPER CASE"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			doc := s.document(t, r.name, container{"name": "c", "image": r.image, "script": "exit 0"})
			if _, err := s.cli.Pipe(deadline(t, patience), []byte(doc), "taskdef", "register", "-f", "-"); err != nil {
				if r.name == "not-a-reference" {
					t.Logf("refused at registration: %v", err)
					return
				}
				t.Fatal(err)
			}
			refused(t, s.cli, "", 125, r.want, "task", "run", "--cluster", cluster, "--taskdef", r.name, "--wait")
		})
	}
	t.Run("registry-down", func(t *testing.T) {
		doc := s.document(t, "down", container{"name": "c", "image": fmt.Sprintf("127.0.0.1:%d/shell:1", port), "script": "exit 0"})
		id, err := s.cli.RunTask(deadline(t, patience), cluster, doc)
		if err != nil {
			t.Fatal(err)
		}
		s.await(t, id, "the task to say what it waits for", patience, func(now rig.Task) bool {
			return !stopped(now) && strings.Contains(now.Note, "refuses")
		})
		// The site's agents give up pulling after a few seconds.
		end := s.await(t, id, "the task to give up", patience, stopped)
		if !strings.Contains(end.StoppedReason, "CannotPullContainerError") {
			t.Errorf("%+v", end)
		}
	})
	if left := h.containers(t, s.namespace); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestHostPort: a bridge container is reached through its host port; a port
// that somebody outside Belay has is a clear failure.
func TestHostPort(t *testing.T) {
	needRoot(t)
	s := newSite(t, "containerd")
	port, err := rig.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	web := container{"name": "c", "image": host(t).image("workload"), "command": []any{"serve", ":8080", "hello"},
		"portMappings": []any{map[string]any{"containerPort": 8080, "hostPort": port}}}
	task := s.run(t, "web", web)
	if b := task.Container("c").NetworkBindings; len(b) != 1 || b[0].HostPort != port || b[0].ContainerPort != 8080 {
		t.Errorf("network bindings %+v", b)
	}
	if err := rig.Until(deadline(t, patience), nil, "the port to answer", func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).Port
	web["portMappings"] = []any{map[string]any{"containerPort": 8080, "hostPort": taken}}
	id, err := s.cli.RunTask(deadline(t, patience), cluster, s.document(t, "taken", web))
	if err != nil {
		t.Fatal(err)
	}
	end := s.await(t, id, "the task to fail", patience, stopped)
	if !strings.Contains(end.StoppedReason, fmt.Sprint(taken)) {
		t.Errorf("the reason does not name port %d: %+v", taken, end)
	}
}
