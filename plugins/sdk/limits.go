package sdk

import "fmt"

// Limits of what a runtime tells. The agent takes no answer that breaks them:
// what a plugin says travels to the control plane and is kept, so that one
// that talks nonsense must not cost more than its own tasks.
const (
	MaxContainers  = 2048     // of a List, and as many tasks
	MaxRuntimeText = 256      // bytes of an id, a name, a version, an attribute's name or value
	MaxAttributes  = 64       // of a RuntimeInfo
	MaxNetworks    = 16       // of a RuntimeInfo
	MaxPorts       = 1024     // of a container
	MaxReason      = 2 << 10  // bytes of a reason or of an error; more is cut off
	MaxEdits       = 64 << 10 // bytes of Edits, all text together
	MaxImages      = 2048     // of an ImageInventory
	MaxReferences  = 64       // of an image
	MaxReference   = 4 << 10  // bytes of one
)

// CheckRuntimeInfo says what of a runtime's Info breaks the contract; an error
// of kind Internal.
func CheckRuntimeInfo(i RuntimeInfo) error {
	broken := func(format string, args ...any) error { return breach("info", format, args...) }
	switch {
	case len(i.Version) > MaxRuntimeText:
		return broken("the version has %d bytes, at most %d are allowed", len(i.Version), MaxRuntimeText)
	case len(i.Networks) > MaxNetworks:
		return broken("there are %d networks, at most %d are allowed", len(i.Networks), MaxNetworks)
	case len(i.Attributes) > MaxAttributes:
		return broken("there are %d attributes, at most %d are allowed", len(i.Attributes), MaxAttributes)
	}
	for _, n := range i.Networks {
		if n == "" || len(n) > MaxRuntimeText {
			return broken("the name of network %.40q has %d bytes, want 1 to %d", n, len(n), MaxRuntimeText)
		}
	}
	for name, value := range i.Attributes {
		if name == "" || len(name) > MaxRuntimeText || len(value) > MaxRuntimeText {
			return broken("attribute %.40q has a name of %d bytes and a value of %d, want at most %d each", name, len(name), len(value), MaxRuntimeText)
		}
	}
	return nil
}

// CheckContainers says what of a List breaks the contract; an error of kind
// Internal. The agent acts on no part of such a list: what looks like nobody's
// container may be somebody's.
func CheckContainers(i Inventory) error {
	broken := func(format string, args ...any) error { return breach("list", format, args...) }
	if len(i.Containers) > MaxContainers || len(i.Tasks) > MaxContainers {
		return broken("there are %d containers and %d tasks, at most %d each are allowed", len(i.Containers), len(i.Tasks), MaxContainers)
	}
	seen := make(map[Attempt]bool, len(i.Containers))
	for _, c := range i.Containers {
		if err := CheckContainer(c); err != nil {
			return err
		}
		if seen[c.Attempt] {
			return broken("%.100s is there twice", c.Attempt)
		}
		seen[c.Attempt] = true
	}
	for _, t := range i.Tasks {
		if t == "" || len(t) > MaxRuntimeText {
			return broken("task id %.40q has %d bytes, want 1 to %d", t, len(t), MaxRuntimeText)
		}
	}
	return nil
}

// CheckContainer says what of one container breaks the contract; an error of
// kind Internal.
func CheckContainer(c Container) error {
	broken := func(format string, args ...any) error { return breach("list", format, args...) }
	a := c.Attempt
	switch {
	case a.Task == "" || a.Container == "" || len(a.Task) > MaxRuntimeText || len(a.Container) > MaxRuntimeText || a.Number < 0:
		return broken("%.100q is no attempt: want a task's id, a container's name and a number", a.String())
	case c.State != StateCreated && c.State != StateRunning && c.State != StateExited:
		return broken("%s is in state %.40q, want %s, %s or %s", a, c.State, StateCreated, StateRunning, StateExited)
	case len(c.RuntimeID) > MaxRuntimeText || len(c.ImageDigest) > MaxRuntimeText || len(c.IP) > MaxRuntimeText:
		return broken("%s has an id of %d bytes, a digest of %d and an address of %d, at most %d are allowed", a, len(c.RuntimeID), len(c.ImageDigest), len(c.IP), MaxRuntimeText)
	case len(c.Ports) > MaxPorts:
		return broken("%s has %d ports, at most %d are allowed", a, len(c.Ports), MaxPorts)
	}
	for _, p := range c.Ports {
		if len(p.Name) > MaxRuntimeText || len(p.Protocol) > MaxRuntimeText || len(p.HostIP) > MaxRuntimeText {
			return broken("%s has the port %.40q of more than %d bytes", a, p.Name, MaxRuntimeText)
		}
	}
	return nil
}

// CheckImages says what of an image store's list breaks the contract; an error
// of kind Internal.
func CheckImages(i ImageInventory) error {
	broken := func(format string, args ...any) error { return breach("images", format, args...) }
	switch {
	case len(i.Images) > MaxImages:
		return broken("there are %d images, at most %d are allowed", len(i.Images), MaxImages)
	case i.Disk.FreeBytes > i.Disk.TotalBytes:
		return broken("of %d bytes of disk %d are free", i.Disk.TotalBytes, i.Disk.FreeBytes)
	}
	seen := make(map[string]bool, len(i.Images))
	for _, img := range i.Images {
		switch {
		case img.Digest == "" || len(img.Digest) > MaxRuntimeText:
			return broken("digest %.40q has %d bytes, want 1 to %d", img.Digest, len(img.Digest), MaxRuntimeText)
		case seen[img.Digest]:
			return broken("%.100s is there twice", img.Digest)
		case len(img.References) > MaxReferences:
			return broken("%.100s has %d references, at most %d are allowed", img.Digest, len(img.References), MaxReferences)
		}
		seen[img.Digest] = true
		for _, r := range img.References {
			if r == "" || len(r) > MaxReference {
				return broken("reference %.40q has %d bytes, want 1 to %d", r, len(r), MaxReference)
			}
		}
	}
	return nil
}

// CheckEdits says what of a device plugin's Edits breaks the contract; an
// error of kind Internal.
func CheckEdits(e Edits) error {
	size := 0
	add := func(texts ...string) {
		for _, s := range texts {
			size += len(s) + 8
		}
	}
	for _, d := range e.Devices {
		add(d.HostPath, d.ContainerPath, d.Permissions)
	}
	for _, m := range e.Mounts {
		add(m.Type, m.Source, m.Target)
		add(m.Options...)
	}
	for _, h := range e.Hooks {
		add(h.Point, h.Path)
		add(h.Args...)
		add(h.Env...)
	}
	for _, r := range e.DeviceRules {
		add(r.Type, r.Permissions)
	}
	add(e.Env...)
	add(e.CDIDevices...)
	size += 8 * len(e.AdditionalGIDs)
	if size > MaxEdits {
		return breach("edits", "they have %d bytes, at most %d are allowed", size, MaxEdits)
	}
	return nil
}

func breach(op, format string, args ...any) error {
	return Errorf(Internal, op, "%s", fmt.Sprintf(format, args...)).WithHint("this is a defect of the plugin")
}
