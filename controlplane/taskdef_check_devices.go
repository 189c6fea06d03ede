package controlplane

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/belay-edge/belay/controlplane/wire/allot"
)

var deviceKindPattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// devices checks what a container asks for, in ECS's words and in Belay's.
func (c *taskDefinitionCheck) devices(at string, ct *ContainerDefinition) {
	gpus := 0
	for i, r := range ct.ResourceRequirements {
		path := fmt.Sprintf("%s.resourceRequirements[%d]", at, i)
		c.required(path+".type", r.Type)
		switch r.Type {
		case "GPU":
			if gpus++; gpus > 1 {
				c.problem(path+".type", `is "GPU", which an earlier requirement has; ask for all of them in one`)
			}
			c.gpuCount(path+".value", r)
		case "NeuronDevice":
			c.warn(path, "kept, but has no effect: no device plugin knows this sort of accelerator")
		case "InferenceAccelerator":
			c.problem(path+".type", `is "InferenceAccelerator", which is refused: it is no longer offered by anyone; ask for a device of kind npu or tpu in belay.devices`)
		default:
			c.oneOf(path+".type", r.Type, "GPU", "NeuronDevice")
		}
	}
	if ct.Belay == nil {
		return
	}
	if n := len(ct.Belay.Devices); n+gpus > allot.MaxRequests {
		c.problem(at+".belay.devices", "has %d requests; a container may have at most %d, resourceRequirements of type GPU included", n, allot.MaxRequests)
	}
	for i, r := range ct.Belay.Devices {
		path := fmt.Sprintf("%s.belay.devices[%d]", at, i)
		if c.required(path+".kind", r.Kind) && !deviceKindPattern.MatchString(r.Kind) {
			c.problem(path+".kind", "is %s; it must be a kind of device such as gpu, npu, tpu, camera or serial: a lower-case letter, then at most 31 letters, digits and hyphens", quote(r.Kind))
		}
		if _, given := c.lines[path+".count"]; given {
			c.intRange(path+".count", &r.Count, 1, allot.MaxCount)
		}
		if c.broken(path + ".where") {
			continue
		}
		if _, err := allot.Where(r.Where); err != nil {
			c.problem(path+".where", "is %s: %s", quote(r.Where), err)
		}
	}
}

func (c *taskDefinitionCheck) gpuCount(path string, r ResourceRequirement) {
	if r.SharingStrategy != nil && r.Value == "" {
		return // a share of one
	}
	if !c.required(path, r.Value) {
		return
	}
	if n, err := strconv.Atoi(r.Value); err != nil || n < 1 || n > allot.MaxCount {
		c.problem(path, "is %s; it must be a number of GPUs from 1 to %d, as a string", quote(r.Value), allot.MaxCount)
	}
}
