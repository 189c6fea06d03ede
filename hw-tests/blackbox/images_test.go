package blackbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/belay-edge/belay/hw-tests/rig"
)

// imagesOf is what `belay-agent status -o json` says of a runtime's images.
type imagesOf struct {
	Count, Unused, Removed                           int
	Bytes, FreedBytes, DiskTotalBytes, DiskFreeBytes uint64
}

func (s *site) imagesOf(t *testing.T) (imagesOf, error) {
	t.Helper()
	out, err := exec.CommandContext(deadline(t, patience), s.agent.Bin.Path("belay-agent"), "status", "--run-dir", s.agent.RunDir, "-o", "json").Output()
	if err != nil {
		return imagesOf{}, err
	}
	var st struct{ Images map[string]imagesOf }
	err = json.Unmarshal(out, &st)
	return st.Images[s.runtime], err
}

// kept lists the images in the site's namespace of containerd.
func (s *site) kept(t *testing.T) []string {
	t.Helper()
	out, err := exec.CommandContext(deadline(t, patience), "ctr", "-a", host(t).containerd.Address, "-n", s.namespace, "images", "ls", "-q").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// TestUnusedImagesGo: on a disk that counts as full the image of a task that
// has ended is removed, that of one that runs is not, nor is the operator's
// own; and what is gone is pulled again when it is needed.
func TestUnusedImagesGo(t *testing.T) {
	needRoot(t)
	s := newSiteOf(t, "containerd", func(s *site, a *rig.Agent) {
		s.prepare(t, a)
		text, err := os.ReadFile(a.Config)
		if err != nil {
			t.Fatal(err)
		}
		policy := "[images]\nkeep_unused = \"0s\"\nhigh_percent = 1\nlow_percent = 0\nmin_age = \"3s\"\n"
		if err := os.WriteFile(a.Config, append(text, policy...), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	fresh, theirs := host(t).freshImage(t, 9001), host(t).freshImage(t, 9002)
	if out, err := exec.Command("ctr", "-a", host(t).containerd.Address, "-n", s.namespace, "images", "pull", "--plain-http", theirs).CombinedOutput(); err != nil {
		t.Fatalf("ctr images pull: %v\n%s", err, out)
	}
	stays := s.run(t, "stays", container{"name": "c", "script": waitScript(s.dir, "stays")})
	digest := map[string]string{}
	for round := range 2 {
		name := fmt.Sprintf("goes%d", round)
		task := s.run(t, name, container{"name": "c", "image": fresh, "script": waitScript(s.dir, name)})
		digest[name] = task.Container("c").ImageDigest
		release(t, s.dir, name)
		exits(t, s, task.ID, 7)
		var said imagesOf
		if err := rig.Until(deadline(t, patience), s.agent.Process, "the unused image to go", func() (err error) {
			if said, err = s.imagesOf(t); err == nil && (said.Removed != round+1 || said.Count != 1) {
				err = fmt.Errorf("status says %+v", said)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if said.FreedBytes < 1<<20 || said.DiskTotalBytes == 0 || said.Unused != 0 {
			t.Errorf("status says %+v", said)
		}
		kept := strings.Join(s.kept(t), " ")
		if strings.Contains(kept, digest[name]) || !strings.Contains(kept, stays.Container("c").ImageDigest) || !strings.Contains(kept, theirs) {
			t.Errorf("containerd has %q", kept)
		}
	}
	if now := s.await(t, stays.ID, "the other task to run", patience, running); now.Container("c").PID != stays.Container("c").PID {
		t.Errorf("it is %+v, was %+v", now, stays)
	}
	release(t, s.dir, "stays")
	exits(t, s, stays.ID, 7)
}
