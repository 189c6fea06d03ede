package controlplane

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
)

var portRangePattern = regexp.MustCompile(`^([0-9]{1,5})-([0-9]{1,5})$`)

func (c *taskDefinitionCheck) container(at string, ct *ContainerDefinition) {
	switch {
	case c.broken(at + ".name"):
	case ct.Name == "":
		c.problem(at+".name", "is required")
	case !namePattern.MatchString(ct.Name):
		c.problem(at+".name", "is %s; it must be 1 to 255 letters, digits, underscores and hyphens", quote(ct.Name))
	}
	if c.td.RuntimeName() == RuntimeProcess {
		c.process(at, ct)
	} else {
		c.image(at, ct)
	}
	c.resources(at, ct)
	c.environment(at, ct)
	c.ports(at, ct)
	c.mounts(at, ct)
	c.health(at, ct)
	c.hosts(at, ct)
	c.linux(at, ct)
	c.devices(at, ct)
	c.keptFields(at, ct)
	c.intRange(at+".startTimeout", ct.StartTimeout, 1, maxTimeout)
	c.intRange(at+".stopTimeout", ct.StopTimeout, 1, maxTimeout)
	if rp := ct.RestartPolicy; rp != nil {
		if rp.Enabled == nil && !c.broken(at+".restartPolicy.enabled") {
			c.problem(at+".restartPolicy.enabled", "is required")
		}
		if n := len(rp.IgnoredExitCodes); n > 50 {
			c.problem(at+".restartPolicy.ignoredExitCodes", "has %d codes; at most 50 are allowed", n)
		}
		for i := range rp.IgnoredExitCodes {
			c.intRange(fmt.Sprintf("%s.restartPolicy.ignoredExitCodes[%d]", at, i), &rp.IgnoredExitCodes[i], 0, 255)
		}
		c.intRange(at+".restartPolicy.restartAttemptPeriod", rp.RestartAttemptPeriod, 60, 1800)
	}
}

func (c *taskDefinitionCheck) image(at string, ct *ContainerDefinition) {
	if c.broken(at+".image") || !c.required(at+".image", ct.Image) {
		return
	}
	if _, err := reference.ParseDockerRef(ct.Image); err != nil {
		why := strings.TrimPrefix(err.Error(), "invalid reference format: ")
		c.problem(at+".image", "is %s, which is no image reference: %s", quote(ct.Image), why)
	}
}

// process holds a container against what a bare process of the device can
// have: there is no image, and no mount or network namespace of its own.
func (c *taskDefinitionCheck) process(at string, ct *ContainerDefinition) {
	if ct.Image != "" {
		c.warn(at+".image", "kept, but has no effect: the process runtime runs a program of the device")
	}
	argv, name := ct.Command, "command"
	if len(ct.EntryPoint) > 0 {
		argv, name = ct.EntryPoint, "entryPoint"
	}
	switch {
	case c.broken(at + "." + name):
	case len(argv) == 0:
		c.problem(at+".command", "is required by the process runtime: the absolute path of a program, then its arguments")
	case !strings.HasPrefix(argv[0], "/") && !c.broken(at+"."+name+"[0]"):
		c.problem(at+"."+name+"[0]", "is %s; the process runtime needs the absolute path of a program on the device", quote(argv[0]))
	}
	lp := ct.LinuxParameters
	for _, f := range []struct {
		name  string
		given bool
	}{
		{"mountPoints", len(ct.MountPoints) > 0},
		{"volumesFrom", len(ct.VolumesFrom) > 0},
		{"readonlyRootFilesystem", isTrue(ct.ReadonlyRootFilesystem)},
		{"disableNetworking", isTrue(ct.DisableNetworking)},
		{"hostname", ct.Hostname != ""},
		{"dnsServers", len(ct.DNSServers) > 0},
		{"dnsSearchDomains", len(ct.DNSSearchDomains) > 0},
		{"extraHosts", len(ct.ExtraHosts) > 0},
		{"systemControls", len(ct.SystemControls) > 0},
		{"linuxParameters.devices", lp != nil && len(lp.Devices) > 0},
		{"linuxParameters.tmpfs", lp != nil && len(lp.Tmpfs) > 0},
		{"linuxParameters.sharedMemorySize", lp != nil && lp.SharedMemorySize != nil},
		{"linuxParameters.initProcessEnabled", lp != nil && isTrue(lp.InitProcessEnabled)},
	} {
		if f.given {
			c.problem(at+"."+f.name, "cannot be had from the process runtime: its programs share the device's files, network and devices")
		}
	}
}

func (c *taskDefinitionCheck) resources(at string, ct *ContainerDefinition) {
	c.intRange(at+".cpu", ct.CPU, 0, 262144)
	c.intRange(at+".memory", ct.Memory, minMemoryMiB, maxMemoryMiB)
	c.intRange(at+".memoryReservation", ct.MemoryReservation, minMemoryMiB, maxMemoryMiB)
	if ct.Memory != nil && ct.MemoryReservation != nil && *ct.MemoryReservation > *ct.Memory {
		c.problem(at+".memoryReservation", "is %d MiB; it must not be more than memory, %d MiB", *ct.MemoryReservation, *ct.Memory)
	}
}

func (c *taskDefinitionCheck) environment(at string, ct *ContainerDefinition) {
	seen := map[string]int{}
	for i, e := range ct.Environment {
		path := fmt.Sprintf("%s.environment[%d].name", at, i)
		switch first, again := seen[e.Name]; {
		case c.broken(path):
		case e.Name == "":
			c.problem(path, "is required")
		case strings.Contains(e.Name, "="):
			c.problem(path, `is %s; it must not contain "="`, quote(e.Name))
		case again:
			c.warn(path, "%s is given by environment[%d] too: the last one counts", quote(e.Name), first)
		}
		seen[e.Name] = i
	}
	if ct.WorkingDirectory != "" {
		c.absolute(at+".workingDirectory", ct.WorkingDirectory)
	}
	if ct.User != "" && !userPattern.MatchString(ct.User) {
		c.problem(at+".user", "is %s; it must be a user, or user:group, by name or number", quote(ct.User))
	}
	for name, v := range ct.DockerLabels {
		if name == "" {
			c.problem(at+".dockerLabels", "has a label without a name (its value is %s)", quote(v))
		}
	}
}

func (c *taskDefinitionCheck) ports(at string, ct *ContainerDefinition) {
	mode := c.td.Network()
	if len(ct.PortMappings) > 0 && mode == "none" {
		c.problem(at+".portMappings", "needs a network; networkMode is none")
	}
	if len(ct.PortMappings) > 0 && isTrue(ct.DisableNetworking) {
		c.problem(at+".portMappings", "needs a network; disableNetworking is true")
	}
	if n := len(ct.PortMappings); n > 100 {
		c.problem(at+".portMappings", "has %d mappings; at most 100 are allowed", n)
	}
	for i, m := range ct.PortMappings {
		path := fmt.Sprintf("%s.portMappings[%d]", at, i)
		switch {
		case c.broken(path + ".containerPort"):
		case m.ContainerPort == nil && m.ContainerPortRange == "":
			c.problem(path+".containerPort", "is required")
		case m.ContainerPort != nil && m.ContainerPortRange != "":
			c.problem(path, "has both containerPort and containerPortRange; give one")
		}
		c.intRange(path+".containerPort", m.ContainerPort, 1, 65535)
		c.intRange(path+".hostPort", m.HostPort, 0, 65535)
		c.oneOf(path+".protocol", m.Protocol, "tcp", "udp")
		c.oneOf(path+".appProtocol", m.AppProtocol, "http", "http2", "grpc")
		if m.Name != "" && !portNamePattern.MatchString(m.Name) {
			c.problem(path+".name", "is %s; it must be 1 to 64 lower-case letters, digits, underscores and hyphens", quote(m.Name))
		}
		if mode == "host" && m.ContainerPort != nil && value(m.HostPort) != 0 && *m.HostPort != *m.ContainerPort {
			c.problem(path+".hostPort", "is %d; on the host network it must be left out or be the container's port, %d", *m.HostPort, *m.ContainerPort)
		}
		if r := m.ContainerPortRange; r != "" {
			c.portRange(path, r, m.HostPort)
		}
	}
}

func (c *taskDefinitionCheck) portRange(path, r string, hostPort *int) {
	var first, last int
	if p := portRangePattern.FindStringSubmatch(r); p != nil {
		first, _ = strconv.Atoi(p[1]) // digits by the pattern
		last, _ = strconv.Atoi(p[2])
	}
	if first < 1 || last > 65535 || first >= last {
		c.problem(path+".containerPortRange", `is %s; it must be two rising ports such as "8000-8010", from 1 to 65535`, quote(r))
	}
	if hostPort != nil {
		c.problem(path+".hostPort", "cannot be given with containerPortRange")
	}
}

func (c *taskDefinitionCheck) mounts(at string, ct *ContainerDefinition) {
	targets := map[string]bool{}
	target := func(path, p string) {
		if !c.required(path, p) {
			return
		}
		c.absolute(path, p)
		clean := strings.TrimRight(p, "/")
		if clean == "" {
			c.problem(path, "is %s; nothing can be mounted over the container's root", quote(p))
			return
		}
		if targets[clean] {
			c.problem(path, "is %s, where something is mounted already", quote(p))
		}
		targets[clean] = true
	}
	for i, m := range ct.MountPoints {
		path := fmt.Sprintf("%s.mountPoints[%d]", at, i)
		if c.required(path+".sourceVolume", m.SourceVolume) &&
			!slices.ContainsFunc(c.td.Volumes, func(v Volume) bool { return v.Name == m.SourceVolume }) {
			c.problem(path+".sourceVolume", "is %s, which is no volume of the task", quote(m.SourceVolume))
		}
		target(path+".containerPath", m.ContainerPath)
	}
	if lp := ct.LinuxParameters; lp != nil {
		for i, t := range lp.Tmpfs {
			path := fmt.Sprintf("%s.linuxParameters.tmpfs[%d]", at, i)
			target(path+".containerPath", t.ContainerPath)
			if t.Size == nil && !c.broken(path+".size") {
				c.problem(path+".size", "is required, in MiB")
			}
			c.intRange(path+".size", t.Size, 1, maxMemoryMiB)
			for j, o := range t.MountOptions {
				name, _, _ := strings.Cut(o, "=")
				if !slices.Contains(tmpfsOptions, name) {
					c.problem(fmt.Sprintf("%s.mountOptions[%d]", path, j), "is %s, which is no mount option ECS knows", quote(o))
				}
			}
		}
	}
	for i, v := range ct.VolumesFrom {
		path := fmt.Sprintf("%s.volumesFrom[%d].sourceContainer", at, i)
		if !c.required(path, v.SourceContainer) {
			continue
		}
		if v.SourceContainer == ct.Name {
			c.problem(path, "is the container itself")
		} else if !c.knows(v.SourceContainer) {
			c.problem(path, "is %s, which is no container of the task", quote(v.SourceContainer))
		}
	}
}

func (c *taskDefinitionCheck) knows(container string) bool {
	return slices.ContainsFunc(c.td.ContainerDefinitions, func(o ContainerDefinition) bool { return o.Name == container })
}

func (c *taskDefinitionCheck) health(at string, ct *ContainerDefinition) {
	h := ct.HealthCheck
	if h == nil {
		return
	}
	path := at + ".healthCheck"
	switch {
	case c.broken(path) || c.broken(path+".command"):
	case len(h.Command) == 0:
		c.problem(path+".command", "is required")
	case h.Command[0] != "CMD" && h.Command[0] != "CMD-SHELL":
		c.problem(path+".command[0]", "is %s; it must be CMD (then a program and its arguments) or CMD-SHELL (then a line for the shell)", quote(h.Command[0]))
	case len(h.Command) == 1:
		c.problem(path+".command", "has nothing after %s", h.Command[0])
	case h.Command[0] == "CMD-SHELL" && len(h.Command) > 2:
		c.warn(path+".command", "CMD-SHELL takes one line for the shell; the parts after it are only that line's $0, $1 and so on")
	}
	c.intRange(path+".interval", h.Interval, 5, 300)
	c.intRange(path+".timeout", h.Timeout, 2, 60)
	c.intRange(path+".retries", h.Retries, 1, 10)
	c.intRange(path+".startPeriod", h.StartPeriod, 0, 300)
}

func (c *taskDefinitionCheck) hosts(at string, ct *ContainerDefinition) {
	if ct.Hostname != "" && (len(ct.Hostname) > 253 || !hostnamePattern.MatchString(ct.Hostname)) {
		c.problem(at+".hostname", "is %s, which is no host name", quote(ct.Hostname))
	}
	for i, s := range ct.DNSServers {
		if _, err := netip.ParseAddr(s); err != nil {
			c.problem(fmt.Sprintf("%s.dnsServers[%d]", at, i), "is %s, which is no IP address", quote(s))
		}
	}
	for i, s := range ct.DNSSearchDomains {
		if s != "." && !hostnamePattern.MatchString(strings.TrimSuffix(s, ".")) {
			c.problem(fmt.Sprintf("%s.dnsSearchDomains[%d]", at, i), "is %s, which is no domain name", quote(s))
		}
	}
	for i, h := range ct.ExtraHosts {
		path := fmt.Sprintf("%s.extraHosts[%d]", at, i)
		if c.required(path+".hostname", h.Hostname) && strings.ContainsAny(h.Hostname, " \t\n\r#") {
			c.problem(path+".hostname", "is %s, which is no host name", quote(h.Hostname))
		}
		if c.required(path+".ipAddress", h.IPAddress) {
			if _, err := netip.ParseAddr(h.IPAddress); err != nil {
				c.problem(path+".ipAddress", "is %s, which is no IP address", quote(h.IPAddress))
			}
		}
	}
}
