package agent

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// ImagePolicy says which unused images are removed. An image that a task on
// this device needs, now or for a later attempt, never is.
type ImagePolicy struct {
	// KeepUnused is how long an unused image stays, of the time the device is
	// on; 0: for ever, unless the disk fills.
	KeepUnused time.Duration
	// Once HighPercent of the disk is used, images that have been unused for
	// longest are removed until less than LowPercent is. 100: never.
	HighPercent, LowPercent int
	// MinAge is how long an image must have been unused for that.
	MinAge time.Duration
}

// DefaultImagePolicy is what holds unless configured.
func DefaultImagePolicy() ImagePolicy {
	return ImagePolicy{KeepUnused: 7 * 24 * time.Hour, HighPercent: 85, LowPercent: 80, MinAge: 2 * time.Minute}
}

// Unused is on record: how long images have been unused while the device was on.
type Unused struct {
	Images []UnusedImage `json:"images,omitempty"`
}

// UnusedImage is one image of one runtime.
type UnusedImage struct {
	Runtime string        `json:"runtime"`
	Digest  string        `json:"digest"`
	For     time.Duration `json:"for"`
}

const (
	imagesEvery = 5 * time.Minute
	// imagesSoon is the least time between two looks that nothing asked for.
	imagesSoon = 10 * time.Second
	// What is written of the time images are unused: rarely by itself, else
	// beside other things.
	unusedWrite = 6 * time.Hour
	unusedWorth = time.Hour
)

// imageState is what the loop knows of one runtime's images.
type imageState struct {
	none  bool // it keeps no account of them
	known bool // listed since the last removal
	busy  verb
	at    time.Duration // of the next look
	retry retry

	inv    sdk.ImageInventory
	unused map[string]time.Duration // by digest: the moment it would be since when, perhaps before this boot
	failed map[string]*retry        // removals

	pressed bool // past the high mark, and not yet below the low one
	full    bool // a pull found no room

	// Of this life of the agent, to be shown.
	removed int
	freed   uint64
}

// needed says that some task that is not over was, or may yet be, started from
// the image. A container whose image is not resolved needs every image of that
// repository: which one it will be is not known.
func (s *State) needed(runtime string, img sdk.StoredImage) bool {
	for _, t := range s.Tasks {
		if t.runtimeName() != runtime || t.Status == Stopped && t.clean() {
			continue
		}
		for _, c := range t.Containers {
			if c.Digest == img.Digest && c.Digest != "" {
				return true
			}
			if _, pinned, _ := strings.Cut(c.Spec.GetImage(), "@"); pinned == img.Digest && pinned != "" {
				return true
			}
			want := repository(c.Spec.GetImage())
			if c.Digest == "" && slices.ContainsFunc(img.References, func(ref string) bool { return repository(ref) == want }) {
				return true
			}
		}
	}
	return false
}

// repository is a reference without tag and digest, short as people write it.
func repository(ref string) string {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	for _, prefix := range []string{"index.docker.io/", "docker.io/", "library/"} {
		ref = strings.TrimPrefix(ref, prefix)
	}
	return ref
}

// pulling says that a pull of the runtime is under way.
func (s *State) pulling(runtime string) bool {
	return slices.ContainsFunc(s.Tasks, func(t *Task) bool {
		return t.runtimeName() == runtime && slices.ContainsFunc(t.Containers, func(c *Container) bool { return c.pulling })
	})
}

// images plans the look at a runtime's images, and the removal of one.
func (p *planner) images(rt *runtimeState) {
	im := &rt.images
	if !rt.known || !rt.info.Images || im.none || im.busy != "" {
		return
	}
	if p.due(im.at) {
		p.do(action{Verb: callImages, Runtime: rt.name})
		return
	}
	// After damage to the state a task may be missing whose image is here. And
	// what is being pulled may be what is about to go.
	if !im.known || !p.s.trusted || p.s.pulling(rt.name) {
		return
	}
	if img, why := p.expendable(rt); img != nil {
		p.do(action{Verb: callDiscard, Runtime: rt.name, Image: img.Digest, Reason: why})
	}
}

// expendable finds the image that is to go first, if any is, and why.
func (p *planner) expendable(rt *runtimeState) (*sdk.StoredImage, string) {
	im, policy := &rt.images, p.s.Limits.Images
	press := im.pressed || im.full
	var first *sdk.StoredImage
	why := ""
	for i := range im.inv.Images {
		img := &im.inv.Images[i]
		since, unused := im.unused[img.Digest]
		if !unused || img.InUse || p.s.needed(rt.name, *img) {
			continue
		}
		if r := im.failed[img.Digest]; r != nil && !p.due(r.at) {
			continue
		}
		reason := ""
		switch {
		case policy.KeepUnused > 0 && p.due(after(since, policy.KeepUnused)):
			reason = "unused for " + policy.KeepUnused.String()
		case press && p.due(after(since, policy.MinAge)):
			reason = "the disk is full"
		default:
			continue
		}
		if first == nil || cmp.Or(cmp.Compare(since, im.unused[first.Digest]), -cmp.Compare(img.Bytes, first.Bytes), strings.Compare(img.Digest, first.Digest)) < 0 {
			first, why = img, reason
		}
	}
	return first, why
}

// every is how often a runtime's images are looked at.
func (l Limits) every() time.Duration {
	if keep := l.Images.KeepUnused; keep > 0 {
		return min(imagesEvery, max(imagesSoon, keep/4))
	}
	return imagesEvery
}

// beginImages marks a call about images as under way.
func (s *State) beginImages(a action) {
	im := &s.runtime(a.Runtime).images
	im.busy = a.Verb
	if a.Verb == callDiscard {
		im.full = false // one image for one pull that found no room
	}
}

// finishImages takes in what became of a call about images.
func (s *State) finishImages(r result, now time.Duration) {
	rt := s.runtime(r.Runtime)
	im := &rt.images
	im.busy = ""
	switch {
	case r.err != nil && sdk.KindOf(r.err) == sdk.Unsupported:
		*im = imageState{none: true}
	case r.err != nil && r.Verb == callImages:
		im.retry.fail(now, s.jitter(), r.err)
		im.at = im.retry.at
	case r.err != nil:
		f := im.failed[r.Image]
		if f == nil {
			f = &retry{}
			im.failed[r.Image] = f
		}
		f.fail(now, s.jitter(), r.err)
		f.at = max(f.at, now+s.Limits.every())
		im.at, im.known = now+imagesSoon, false
	case r.Verb == callDiscard:
		for _, img := range im.inv.Images {
			if img.Digest == r.Image {
				im.removed++
				im.freed += img.Bytes
			}
		}
		im.at, im.known = now, false
	default:
		s.tookImages(rt, r.images, now)
	}
}

// tookImages takes in what images a runtime has.
func (s *State) tookImages(rt *runtimeState, inv sdk.ImageInventory, now time.Duration) {
	im := &rt.images
	im.inv, im.known, im.retry, im.at = inv, true, retry{}, now+s.Limits.every()
	unused, failed := map[string]time.Duration{}, map[string]*retry{}
	for _, img := range inv.Images {
		if f := im.failed[img.Digest]; f != nil {
			failed[img.Digest] = f
		}
		if img.InUse || s.needed(rt.name, img) {
			continue
		}
		since, was := im.unused[img.Digest]
		if !was {
			since = now
			if im.unused == nil { // the first look of this life
				since -= s.unusedBefore(rt.name, img.Digest)
			}
		}
		unused[img.Digest] = since
	}
	im.unused, im.failed = unused, failed
	// In parts of a thousand: a disk may have more bytes than fit times 100.
	total, used := inv.Disk.TotalBytes/1000, (inv.Disk.TotalBytes-min(inv.Disk.FreeBytes, inv.Disk.TotalBytes))/1000
	high, low := uint64(s.Limits.Images.HighPercent), uint64(s.Limits.Images.LowPercent)
	switch {
	case total == 0 || high >= 100 || used*100 < low*total:
		im.pressed = false
	case used*100 >= high*total:
		im.pressed = true
	}
}

// noRoom says that a pull found no room: what is not needed goes, one image
// for each time.
func (s *State) noRoom(runtime string, now time.Duration) {
	im := &s.runtime(runtime).images
	im.full = true
	im.at = min(im.at, now)
}

// unusedBefore is how long an image had been unused when the agent started, as
// far as that is on record.
func (s *State) unusedBefore(runtime, digest string) time.Duration {
	for _, u := range s.savedUnused.Images {
		if u.Runtime == runtime && u.Digest == digest {
			return max(0, u.For)
		}
	}
	return 0
}

// unusedNow is what there is to record.
func (s *State) unusedNow(now time.Duration) Unused {
	var u Unused
	for _, name := range slices.Sorted(maps.Keys(s.Runtimes)) {
		im := &s.Runtimes[name].images
		if im.unused == nil { // not looked at yet: what is on record stands
			for _, old := range s.savedUnused.Images {
				if old.Runtime == name && !im.none {
					u.Images = append(u.Images, old)
				}
			}
			continue
		}
		for _, digest := range slices.Sorted(maps.Keys(im.unused)) {
			u.Images = append(u.Images, UnusedImage{Runtime: name, Digest: digest, For: max(0, now-im.unused[digest])})
		}
	}
	return u
}

// nextUnused is when how long images are unused is worth a write of its own.
func (s *State) nextUnused() time.Duration {
	if s.Limits.Images.KeepUnused <= 0 {
		return never
	}
	for _, rt := range s.Runtimes {
		if len(rt.images.unused) > 0 {
			return s.savedUnusedAt + unusedWrite
		}
	}
	return never
}

// unsavedUnused adds the record of unused images when it is due, or beside
// other records when it is worth it.
func (s *State) unsavedUnused(now time.Duration, alone bool, add func(Record, func())) {
	if s.Limits.Images.KeepUnused <= 0 {
		return
	}
	if at := s.nextUnused(); alone && (at == never || now < at) {
		return
	}
	u := s.unusedNow(now)
	if !alone && !differs(u, s.savedUnused) {
		return
	}
	add(Record{Unused: &u}, func() { s.savedUnused, s.savedUnusedAt = u, now })
}

// differs says that two records differ by more than is worth a write.
func differs(a, b Unused) bool {
	return !slices.EqualFunc(a.Images, b.Images, func(x, y UnusedImage) bool {
		return x.Runtime == y.Runtime && x.Digest == y.Digest && max(x.For-y.For, y.For-x.For) < unusedWorth
	})
}

// ImagesSnapshot is what the agent knows of a runtime's images.
type ImagesSnapshot struct {
	Count, Unused      int
	Bytes, UnusedBytes uint64
	Disk               sdk.Disk
	// Pressed: the disk is fuller than it should be. Stuck: and there is no
	// unused image left to remove.
	Pressed, Stuck bool
	// Removed and FreedBytes count since the agent started.
	Removed    int
	FreedBytes uint64
	Error      string
}

func (s *State) imagesSnapshot(rt *runtimeState) *ImagesSnapshot {
	im := &rt.images
	if im.none || im.unused == nil && im.retry.failures == 0 {
		return nil
	}
	out := &ImagesSnapshot{
		Count: len(im.inv.Images), Disk: im.inv.Disk, Pressed: im.pressed, Removed: im.removed, FreedBytes: im.freed, Error: im.retry.err,
	}
	for _, img := range im.inv.Images {
		out.Bytes += img.Bytes
		if _, unused := im.unused[img.Digest]; unused {
			out.Unused++
			out.UnusedBytes += img.Bytes
		}
	}
	out.Stuck = im.pressed && im.known && out.Unused == 0
	return out
}
