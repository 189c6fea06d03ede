package agent

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// noteDiscard: whatever was decided, no image goes that a task needs by what
// the control plane and the disk know of it.
func (s *simulation) noteDiscard(j job) {
	if j.Verb != callDiscard {
		return
	}
	for n := range s.ids {
		a, over := s.wanted[id(n)], s.over[id(n)]
		if a == nil || over || s.journal.assignments[id(n)] == nil || a.GetDesired() != Running {
			continue
		}
		if t := s.state.task(id(n)); t == nil || t.Status == Stopped || t.Stop != nil {
			continue
		}
		for _, c := range a.GetSpec().GetContainers() {
			if "sha256:"+repository(c.GetImage()) == j.Image {
				s.t.Fatalf("image %s is to be removed, and task %s needs it for %s", j.Image, id(n), c.GetName())
			}
		}
	}
}

func TestRepository(t *testing.T) {
	for ref, want := range map[string]string{
		"nginx": "nginx", "nginx:1.27": "nginx", "docker.io/library/nginx@sha256:1": "nginx",
		"library/nginx:1": "nginx", "index.docker.io/me/app:2": "me/app", "docker.io/me/app": "me/app",
		"127.0.0.1:5000/app": "127.0.0.1:5000/app", "127.0.0.1:5000/app:1@sha256:2": "127.0.0.1:5000/app",
		"registry.test/library/app:1": "registry.test/library/app", "": "",
	} {
		if got := repository(ref); got != want {
			t.Errorf("repository(%q) is %q, want %q", ref, got, want)
		}
	}
}

// storedImage makes an image of a repository that takes ten bytes.
func storedImage(repo, digest string) sdk.StoredImage {
	return sdk.StoredImage{Digest: digest, References: []string{"docker.io/" + repo + "@" + digest}, Bytes: 10}
}

func TestWhichImageGoes(t *testing.T) {
	policy := ImagePolicy{KeepUnused: 24 * time.Hour, HighPercent: 85, LowPercent: 80, MinAge: 2 * time.Minute}
	const hour = time.Hour
	full, roomy := sdk.Disk{TotalBytes: 100_000, FreeBytes: 10_000}, sdk.Disk{TotalBytes: 100_000, FreeBytes: 50_000}
	four := []sdk.StoredImage{storedImage("main", "sha256:1"), storedImage("young", "sha256:2"), storedImage("old", "sha256:3"), storedImage("older", "sha256:4")}
	// How long each has been unused at most.
	ages := map[string]time.Duration{"sha256:2": time.Minute, "sha256:3": 2 * hour, "sha256:4": 3 * hour}
	for _, tc := range []struct {
		name   string
		disk   sdk.Disk
		change func(*State, *Task, *imageState)
		want   string // digest; "": none
	}{
		{"none before its time", roomy, nil, ""},
		{"the one unused for longest when the disk is full", full, nil, "sha256:4"},
		{"the next when that is in use", full, func(_ *State, _ *Task, im *imageState) { im.inv.Images[3].InUse = true }, "sha256:3"},
		{"the next when that could not be removed", full, func(_ *State, _ *Task, im *imageState) {
			im.failed["sha256:4"] = &retry{failures: 1, at: 1000 * hour}
		}, "sha256:3"},
		{"none that is too young", full, func(_ *State, _ *Task, im *imageState) {
			delete(im.unused, "sha256:3")
			delete(im.unused, "sha256:4")
		}, ""},
		{"by age", roomy, func(_ *State, _ *Task, im *imageState) { im.unused["sha256:3"] -= 24 * hour }, "sha256:3"},
		{"not by age when they are kept for ever", roomy, func(s *State, _ *Task, im *imageState) {
			s.Limits.Images.KeepUnused = 0
			im.unused["sha256:3"] -= 2400 * hour
		}, ""},
		{"not of a full disk when that is no reason", full, func(s *State, _ *Task, im *imageState) {
			s.Limits.Images.HighPercent = 100
			s.tookImages(s.runtime(defaultRuntime), im.inv, 10*hour)
		}, ""},
		{"for a pull that found no room", roomy, func(_ *State, _ *Task, im *imageState) { im.full = true }, "sha256:4"},
		{"none while something is pulled", full, func(_ *State, t *Task, _ *imageState) { t.container("main").pulling = true }, ""},
		{"none when a task may have been lost", full, func(s *State, _ *Task, _ *imageState) { s.trusted = false }, ""},
		{"none while the runtime is away", full, func(s *State, _ *Task, _ *imageState) { s.runtime(defaultRuntime).known = false }, ""},
		{"none that a task needs since it was last looked", full, func(s *State, _ *Task, _ *imageState) {
			s.add(newTask(&wire.Assignment{TaskId: "u", Spec: &wire.TaskSpec{Containers: []*wire.Container{{Name: "c", Image: "older:7"}}}}))
		}, "sha256:3"},
		{"none that a task on its way to its end has", full, func(s *State, _ *Task, _ *imageState) {
			u := newTask(&wire.Assignment{TaskId: "u", Spec: &wire.TaskSpec{Containers: []*wire.Container{{Name: "c", Image: "x"}}}})
			u.Containers[0].Digest, u.Stop, u.Status = "sha256:4", &stopping{}, Stopping
			s.add(u)
		}, "sha256:3"},
		{"one that a stopped task had", full, func(s *State, _ *Task, _ *imageState) {
			u := newTask(&wire.Assignment{TaskId: "u", Spec: &wire.TaskSpec{Containers: []*wire.Container{{Name: "c", Image: "older"}}}})
			u.Containers[0].Digest, u.Stop, u.Status = "sha256:4", &stopping{}, Stopped
			s.add(u)
		}, "sha256:4"},
		{"one that another runtime's task has", full, func(s *State, _ *Task, _ *imageState) {
			s.add(newTask(&wire.Assignment{TaskId: "u", Spec: &wire.TaskSpec{Runtime: "docker", Containers: []*wire.Container{{Name: "c", Image: "older"}}}}))
		}, "sha256:4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const now = 10 * hour
			s := stateOf(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}, func(s *State, task *Task) {
				s.Limits.Images = policy
				in(task.container("main"), phaseRunning, 0)
			})
			rt := s.runtime(defaultRuntime)
			im := &rt.images
			im.none, rt.listAt = false, 100*hour
			im.unused = map[string]time.Duration{}
			for d, age := range ages {
				im.unused[d] = now - age
			}
			s.tookImages(rt, sdk.ImageInventory{Images: slices.Clone(four), Disk: tc.disk}, now)
			if tc.change != nil {
				tc.change(s, s.task("t"), im)
			}
			got := ""
			acts, _ := plan(s, now)
			for _, a := range acts {
				if a.Verb == callDiscard {
					got += a.Image
				}
			}
			if got != tc.want {
				t.Errorf("image %q goes, want %q", got, tc.want)
			}
		})
	}
}

// Between the marks images go on being removed.
func TestDiskIsFreedDownToTheLowMark(t *testing.T) {
	s := newState(Limits{Images: DefaultImagePolicy()}, "boot", Saved{}, 0, nil)
	rt := s.runtime(defaultRuntime)
	var got []bool
	for _, free := range []uint64{30, 16, 15, 18, 20, 21, 18, 14, 19, 100} {
		s.tookImages(rt, sdk.ImageInventory{Disk: sdk.Disk{TotalBytes: 100_000, FreeBytes: free * 1000}}, 0)
		got = append(got, rt.images.pressed)
	}
	want := []bool{false, false, true, true, true, false, false, true, true, false}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("pressed (-want +got):\n%s", d)
	}
}

// How long images are unused is counted across reboots, at four writes a day.
func TestUnusedIsCountedAcrossReboots(t *testing.T) {
	j := newSimJournal()
	policy := ImagePolicy{KeepUnused: 7 * 24 * time.Hour, HighPercent: 85, LowPercent: 80, MinAge: time.Minute}
	inv := sdk.ImageInventory{Images: []sdk.StoredImage{storedImage("old", "sha256:1")}}
	days := 0.0
	for boot := 0; ; boot++ {
		s := newState(Limits{Images: policy}, fmt.Sprint(boot), j.saved(), 0, func() float64 { return 0.5 })
		rt := s.runtime(defaultRuntime)
		rt.known, rt.info, rt.listAt = true, sdk.RuntimeInfo{Images: true}, 1000*time.Hour
		writes := len(j.records)
		for now := time.Duration(0); now < 20*time.Hour; now += 5 * time.Minute {
			s.tookImages(rt, inv, now)
			acts, _, err := s.step(j, now)
			if err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(acts, func(a action) bool { return a.Verb == callDiscard }) {
				days += now.Hours() / 24
				if days < 7 || days > 7+8*2.0/24+0.1 {
					t.Errorf("it went after %.2f days", days)
				}
				return
			}
		}
		if n := len(j.records) - writes; n > 4 {
			t.Errorf("%d writes in 20 h", n)
		}
		if days += 20.0 / 24; days > 10 {
			t.Fatal("it stays for ever")
		}
	}
}

// Property: whatever tasks and images there are, and however full the disk, no
// image goes that a task needs.
func TestNeededImagesNeverGo(t *testing.T) {
	repos := []string{"a", "b", "me/c", "127.0.0.1:5000/d"}
	rapid.Check(t, func(t *rapid.T) {
		const now = 1000 * time.Hour
		s := newState(Limits{Images: ImagePolicy{
			KeepUnused:  time.Duration(rapid.IntRange(0, 3).Draw(t, "keep")) * time.Hour,
			HighPercent: 50, LowPercent: rapid.IntRange(0, 50).Draw(t, "low"),
		}}, "boot", Saved{}, 0, nil)
		rt := s.runtime(defaultRuntime)
		rt.known, rt.info, rt.listAt = true, sdk.RuntimeInfo{Images: true}, 2*now
		inv := sdk.ImageInventory{Disk: sdk.Disk{TotalBytes: 100_000, FreeBytes: uint64(rapid.IntRange(0, 100_000).Draw(t, "free"))}}
		for i, repo := range repos {
			for v := range 2 {
				img := storedImage(repo, fmt.Sprintf("sha256:%d%d", i, v))
				img.InUse = rapid.Bool().Draw(t, "in use")
				inv.Images = append(inv.Images, img)
			}
		}
		s.tookImages(rt, inv, 0)
		needs := map[string]bool{}
		for n := range rapid.IntRange(0, 5).Draw(t, "tasks") {
			i := rapid.IntRange(0, len(repos)-1).Draw(t, "repository")
			image := repos[i] + rapid.SampledFrom([]string{"", ":1", ":2@sha256:ff"}).Draw(t, "tag")
			task := newTask(&wire.Assignment{TaskId: id(n), Spec: &wire.TaskSpec{Containers: []*wire.Container{{Name: "c", Image: image}}}})
			task.Status = rapid.SampledFrom([]string{Pending, Running, Stopping, Stopped}).Draw(t, "status")
			for v := range 2 {
				d := fmt.Sprintf("sha256:%d%d", i, v)
				switch rapid.IntRange(0, 2).Draw(t, "resolved") {
				case v:
					task.Containers[0].Digest = d
				}
			}
			s.add(task)
			c := task.Containers[0]
			if task.Status == Stopped {
				continue
			}
			for v := range 2 {
				if d := fmt.Sprintf("sha256:%d%d", i, v); c.Digest == "" || c.Digest == d {
					needs[d] = true
				}
			}
		}
		rt.images.full, rt.images.at = rapid.Bool().Draw(t, "no room"), 2*now
		p := &planner{s: s, now: now, wake: never}
		p.images(rt)
		for _, a := range p.acts {
			i := slices.IndexFunc(inv.Images, func(img sdk.StoredImage) bool { return img.Digest == a.Image })
			if needs[a.Image] || inv.Images[i].InUse {
				t.Fatalf("image %s goes (%s), it is needed %t and in use %t", a.Image, a.Reason, needs[a.Image], inv.Images[i].InUse)
			}
		}
	})
}

// What is being removed may be what is to be pulled, and the other way round.
func TestNoPullDuringARemoval(t *testing.T) {
	for busy, want := range map[verb]int{"": 1, callImages: 1, callDiscard: 0} {
		s := stateOf(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}, func(s *State, task *Task) {
			task.container("main").Digest = ""
			s.runtime(defaultRuntime).images.none = false
			s.runtime(defaultRuntime).images.busy = busy
		})
		acts, _ := plan(s, time.Second)
		pulls := 0
		for _, a := range acts {
			if a.Verb == callPull {
				pulls++
			}
		}
		if pulls != want {
			t.Errorf("%d pulls while %q is under way, want %d", pulls, busy, want)
		}
	}
}
