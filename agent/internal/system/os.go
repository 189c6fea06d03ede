package system

import (
	"slices"
	"strings"
)

// operatingSystem sets belay.os, belay.os.version, belay.kernel, belay.init
// and belay.virtualization.
func (t tree) operatingSystem(a attributes) {
	release := t.osRelease()
	a.set("belay.os", release["ID"])
	a.set("belay.os.version", release["VERSION_ID"])
	a.set("belay.kernel", t.read("proc/sys/kernel/osrelease"))
	// The directory is systemd's own documented sign that it is init (sd_booted(3)).
	if t.exists("run/systemd/system") {
		a.set("belay.init", "systemd")
	} else {
		a.set("belay.init", t.read("proc/1/comm"))
	}
	a.set("belay.virtualization", t.virtualization())
}

// osRelease parses /etc/os-release, or what stands in for it (os-release(5)).
func (t tree) osRelease() map[string]string {
	text := t.raw("etc/os-release")
	if text == nil {
		text = t.raw("usr/lib/os-release")
	}
	m := map[string]string{}
	for line := range strings.Lines(string(text)) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(k, "#") {
			continue
		}
		m[k] = strings.Trim(v, `"'`)
	}
	return m
}

// virtualization names what the device runs inside, "" for bare metal or when
// nothing says otherwise.
func (t tree) virtualization() string {
	switch {
	case t.read("run/systemd/container") != "":
		return t.read("run/systemd/container")
	case t.exists(".dockerenv"):
		return "docker"
	case t.read("sys/hypervisor/type") != "":
		return t.read("sys/hypervisor/type")
	}
	// x86: CPUID leaf 1, ECX bit 31.
	if slices.Contains(strings.Fields(t.field("proc/cpuinfo", "flags")), "hypervisor") {
		return "vm"
	}
	return ""
}

// archVariant is the variant of an OCI platform: v6, v7 or v8 of ARM.
func (t tree) archVariant(arch string) string {
	switch arch {
	case "arm64":
		return "v8"
	case "arm":
	default:
		return ""
	}
	switch v := t.field("proc/cpuinfo", "CPU architecture"); {
	case strings.HasPrefix(v, "6"):
		return "v6"
	case strings.HasPrefix(v, "7"):
		// The ARM1176 of the first Pis says 7 and is a v6.
		if strings.Contains(t.field("proc/cpuinfo", "model name"), "ARMv6") {
			return "v6"
		}
		return "v7"
	case v == "8", strings.EqualFold(v, "aarch64"):
		return "v7" // 32-bit programs on a 64-bit CPU: what such a userland can run
	}
	return ""
}

// cgroups sets belay.cgroup (v1, hybrid or v2) and belay.cgroup.memory (on or
// off): memory limits cannot be set where it is off.
func (t tree) cgroups(a attributes) {
	const base = "sys/fs/cgroup/"
	if controllers := t.raw(base + "cgroup.controllers"); controllers != nil {
		a.set("belay.cgroup", "v2")
		// Not /proc/cgroups: kernels from 6.12 without MEMCG_V1 leave memory
		// out of it even when it is on (HARDWARE 7).
		a.set("belay.cgroup.memory", onOff(slices.Contains(strings.Fields(string(controllers)), "memory")))
		return
	}
	if t.exists(base + "unified/cgroup.controllers") {
		a.set("belay.cgroup", "hybrid")
	} else if t.exists(base+"cpu") || t.exists(base+"memory") || t.exists(base+"devices") {
		a.set("belay.cgroup", "v1")
	} else {
		return
	}
	a.set("belay.cgroup.memory", onOff(t.memoryV1() && t.exists(base+"memory")))
}

// memoryV1 reads the last column of the memory line of /proc/cgroups, which
// cgroup_disable=memory sets to 0.
func (t tree) memoryV1() bool {
	for line := range strings.Lines(string(t.raw("proc/cgroups"))) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == "memory" {
			return f[3] == "1"
		}
	}
	return false
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}
