package controlplane

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/belay-edge/belay/controlplane/wire/query"
)

// Limits of ECS that hold here too.
const (
	maxContainers = 10
	minMemoryMiB  = 6 // what the least container needs to start
	maxMemoryMiB  = 16 << 20
	maxTimeout    = 24 * 60 * 60 // seconds; on ECS the EC2 launch type names no limit

	// Seconds. A link that fails and comes back within the least is not worth
	// a stop, and not always noticed.
	leastStopAfter = 10
	mostStopAfter  = 365 * 24 * 60 * 60

	// RuntimeDefault runs tasks that name no runtime.
	RuntimeDefault = "containerd"
	// RuntimeProcess runs programs of the device itself, without an image.
	RuntimeProcess = "process"
)

var (
	namePattern     = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	portNamePattern = regexp.MustCompile(`^[a-z0-9_-]{1,64}$`)
	pluginPattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	userPattern     = regexp.MustCompile(`^[^:\s]+(:[^:\s]+)?$`)
	hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)
)

// taskDefinitionCheck holds a decoded definition against every rule.
type taskDefinitionCheck struct {
	*documentDecoder
	td *TaskDefinition
}

func (c *taskDefinitionCheck) check() {
	td := c.td
	switch {
	case c.broken("family"):
	case td.Family == "":
		c.problem("family", "is required")
	case !namePattern.MatchString(td.Family):
		c.problem("family", "is %s; it must be 1 to 255 letters, digits, underscores and hyphens", quote(td.Family))
	}
	if td.Belay != nil && td.Belay.Runtime != "" && !pluginPattern.MatchString(td.Belay.Runtime) {
		c.problem("belay.runtime", "is %s; it must be the name of a runtime plugin: lower-case letters, digits and hyphens", quote(td.Belay.Runtime))
	}
	if td.Belay != nil && td.Belay.Disconnect != nil {
		c.intRange("belay.disconnect.stopAfter", td.Belay.Disconnect.StopAfter, leastStopAfter, mostStopAfter)
	}
	c.oneOf("pidMode", td.PIDMode, "host", "task")
	if td.PIDMode == "task" && td.RuntimeName() != RuntimeProcess {
		c.warn("pidMode", `kept, but "task" has no effect yet: each container has a process namespace of its own`)
	}
	c.oneOf("ipcMode", td.IPCMode, "host", "task", "none")
	c.network()
	c.platform()
	c.tags()
	c.placement()
	if s := td.EphemeralStorage; s != nil {
		c.intRange("ephemeralStorage.sizeInGiB", s.SizeInGiB, 20, 200)
	}
	c.volumes()
	switch n := len(td.ContainerDefinitions); {
	case c.broken("containerDefinitions"):
		return
	case n < 1 || n > maxContainers:
		c.problem("containerDefinitions", "has %d containers; there must be 1 to %d", n, maxContainers)
		return
	}
	for i := range td.ContainerDefinitions {
		c.container(fmt.Sprintf("containerDefinitions[%d]", i), &td.ContainerDefinitions[i])
	}
	c.containerNames()
	c.hostPorts()
	c.dependencies()
	c.totals()
}

// broken tells that the value at path could not be read, or broke a rule: to
// say more of it would only repeat that.
func (c *taskDefinitionCheck) broken(path string) bool { return c.bad[path] }

func (c *taskDefinitionCheck) network() {
	mode := c.td.NetworkMode
	if mode == "awsvpc" {
		c.problem("networkMode", `is "awsvpc", which is refused: a device has no VPC; use bridge, host or none`)
		return
	}
	c.oneOf("networkMode", mode, "bridge", "host", "none")
	if c.td.RuntimeName() == RuntimeProcess {
		if mode != "" && mode != "host" {
			c.problem("networkMode", "is %s; the process runtime has only the host's network: leave it out or say host", quote(mode))
		}
		if c.td.PIDMode == "task" {
			c.problem("pidMode", `is "task"; the process runtime has only the host's process namespace`)
		}
		if c.td.IPCMode == "task" || c.td.IPCMode == "none" {
			c.problem("ipcMode", "is %s; the process runtime has only the host's IPC namespace", quote(c.td.IPCMode))
		}
	}
}

func (c *taskDefinitionCheck) platform() {
	if p := c.td.RuntimePlatform; p != nil {
		c.oneOf("runtimePlatform.cpuArchitecture", p.CPUArchitecture, "X86_64", "ARM64")
		if strings.HasPrefix(p.OperatingSystemFamily, "WINDOWS") {
			c.problem("runtimePlatform.operatingSystemFamily", "is %s, which is refused: devices run Linux", quote(p.OperatingSystemFamily))
		} else {
			c.oneOf("runtimePlatform.operatingSystemFamily", p.OperatingSystemFamily, "LINUX")
		}
	}
	elsewhere := len(c.td.RequiresCompatibilities) > 0
	for i, v := range c.td.RequiresCompatibilities {
		c.oneOf(fmt.Sprintf("requiresCompatibilities[%d]", i), v, "EC2", "EXTERNAL", "FARGATE", "MANAGED_INSTANCES")
		elsewhere = elsewhere && v != "EC2" && v != "EXTERNAL"
	}
	if elsewhere {
		c.warn("requiresCompatibilities", "kept, but has no effect: tasks run on enrolled devices all the same")
	}
}

func (c *taskDefinitionCheck) tags() {
	if n := len(c.td.Tags); n > 50 {
		c.problem("tags", "has %d tags; at most 50 are allowed", n)
	}
	seen := map[string]bool{}
	for i, t := range c.td.Tags {
		path := fmt.Sprintf("tags[%d]", i)
		switch {
		case c.broken(path + ".key"):
		case t.Key == "":
			c.problem(path+".key", "is required")
		case len([]rune(t.Key)) > 128:
			c.problem(path+".key", "has %d characters; at most 128 are allowed", len([]rune(t.Key)))
		case strings.HasPrefix(strings.ToLower(t.Key), "aws:"):
			c.problem(path+".key", "is %s; the prefix aws: is reserved", quote(t.Key))
		case seen[t.Key]:
			c.problem(path+".key", "is %s, which an earlier tag has", quote(t.Key))
		}
		seen[t.Key] = true
		if n := len([]rune(t.Value)); n > 256 {
			c.problem(path+".value", "has %d characters; at most 256 are allowed", n)
		}
	}
}

func (c *taskDefinitionCheck) placement() {
	if n := len(c.td.PlacementConstraints); n > 10 {
		c.problem("placementConstraints", "has %d constraints; at most 10 are allowed", n)
	}
	for i, p := range c.td.PlacementConstraints {
		path := fmt.Sprintf("placementConstraints[%d]", i)
		c.required(path+".type", p.Type)
		c.oneOf(path+".type", p.Type, "memberOf")
		c.required(path+".expression", p.Expression)
		if p.Expression == "" || c.broken(path+".expression") {
			continue
		}
		if _, err := query.Parse(p.Expression, ConstraintSubjects()...); err != nil {
			c.problem(path+".expression", "%s", err)
		}
	}
}

func (c *taskDefinitionCheck) volumes() {
	seen := map[string]bool{}
	for i, v := range c.td.Volumes {
		path := fmt.Sprintf("volumes[%d]", i)
		switch {
		case c.broken(path + ".name"):
		case v.Name == "":
			c.problem(path+".name", "is required")
		case !namePattern.MatchString(v.Name):
			c.problem(path+".name", "is %s; it must be 1 to 255 letters, digits, underscores and hyphens", quote(v.Name))
		case seen[v.Name]:
			c.problem(path+".name", "is %s, which an earlier volume has", quote(v.Name))
		}
		seen[v.Name] = true
		if v.Host != nil && v.Host.SourcePath != "" {
			c.absolute(path+".host.sourcePath", v.Host.SourcePath)
		}
		if d := v.DockerVolumeConfiguration; d != nil {
			c.oneOf(path+".dockerVolumeConfiguration.scope", d.Scope, "task", "shared")
			if v.Host != nil && v.Host.SourcePath != "" {
				c.problem(path, "has both host and dockerVolumeConfiguration; a volume is one or the other")
			}
			if d.Autoprovision != nil && d.Scope != "shared" {
				c.problem(path+".dockerVolumeConfiguration.autoprovision", "is only for volumes of scope shared")
			}
		}
	}
}

// containerNames: unique, and one at least essential.
func (c *taskDefinitionCheck) containerNames() {
	seen := map[string]bool{}
	essential := false
	for i, ct := range c.td.ContainerDefinitions {
		if ct.Name != "" && seen[ct.Name] {
			c.problem(fmt.Sprintf("containerDefinitions[%d].name", i), "is %s, which an earlier container has", quote(ct.Name))
		}
		seen[ct.Name] = true
		essential = essential || ct.IsEssential() || c.broken(fmt.Sprintf("containerDefinitions[%d].essential", i))
	}
	if !essential {
		c.problem("containerDefinitions", "has no essential container; at least one must be (essential is true unless given)")
	}
}

// hostPorts: no two mappings of the task take the same port of the device.
func (c *taskDefinitionCheck) hostPorts() {
	type owner struct{ path string }
	taken := map[PortKey]owner{}
	names := map[string]bool{}
	for i, ct := range c.td.ContainerDefinitions {
		for j, m := range ct.PortMappings {
			path := fmt.Sprintf("containerDefinitions[%d].portMappings[%d]", i, j)
			if m.Name != "" && names[m.Name] {
				c.problem(path+".name", "is %s, which an earlier mapping has", quote(m.Name))
			}
			names[m.Name] = true
			key, fixed := c.td.hostPort(m)
			if !fixed {
				continue
			}
			if first, dup := taken[key]; dup {
				c.problem(path, "takes host port %d/%s, which %s takes already", key.Port, key.Protocol, first.path)
				continue
			}
			taken[key] = owner{path}
		}
	}
}

// totals: containers fit into the task's own size.
func (c *taskDefinitionCheck) totals() {
	cpu, memory := 0, 0
	for i, ct := range c.td.ContainerDefinitions {
		cpu = addWithin(cpu, value(ct.CPU))
		memory = addWithin(memory, ct.memoryDemand())
		if limit := int(c.td.Memory); limit > 0 && value(ct.Memory) > limit {
			c.problem(fmt.Sprintf("containerDefinitions[%d].memory", i), "is %d MiB; the task's memory is %d MiB", *ct.Memory, limit)
		}
	}
	if limit := int(c.td.CPU); limit > 0 && cpu > limit {
		c.problem("cpu", "is %d; the containers ask for %d together", limit, cpu)
	}
	if limit := int(c.td.Memory); limit > 0 && memory > limit {
		c.problem("memory", "is %d MiB; the containers ask for %d MiB together", limit, memory)
	}
}

// addWithin adds sizes that may be nonsense without wrapping round.
func addWithin(a, b int) int {
	const most = math.MaxInt / 2
	return min(a, most) + min(max(b, 0), most)
}

func value(p *int) int {
	if p == nil {
		return 0
	}
	return *p
}

func isTrue(p *bool) bool { return p != nil && *p }

// The small rules.

func (c *taskDefinitionCheck) required(path, v string) bool {
	if v == "" && !c.broken(path) {
		c.problem(path, "is required")
	}
	return v != ""
}

func (c *taskDefinitionCheck) oneOf(path, v string, allowed ...string) {
	if v == "" || slices.Contains(allowed, v) {
		return
	}
	last := len(allowed) - 1
	list := allowed[last]
	if last > 0 {
		list = strings.Join(allowed[:last], ", ") + " or " + list
	}
	c.problem(path, "is %s; it must be %s", quote(v), list)
}

func (c *taskDefinitionCheck) intRange(path string, v *int, least, most int) {
	if v != nil && (*v < least || *v > most) && !c.broken(path) {
		c.problem(path, "is %d; it must be from %d to %d", *v, least, most)
	}
}

func (c *taskDefinitionCheck) absolute(path, v string) {
	switch {
	case v == "":
	case !strings.HasPrefix(v, "/"):
		c.problem(path, "is %s; it must be an absolute path", quote(v))
	case slices.Contains(strings.Split(v, "/"), ".."):
		c.problem(path, `is %s; it must not contain ".."`, quote(v))
	}
}
