package controlplane

import (
	"fmt"
	"strings"
)

// dependencies: every one known, possible, and none going round.
func (c *taskDefinitionCheck) dependencies() {
	byName := map[string]*ContainerDefinition{}
	for i := range c.td.ContainerDefinitions {
		byName[c.td.ContainerDefinitions[i].Name] = &c.td.ContainerDefinitions[i]
	}
	depends, volumes := map[string][]string{}, map[string][]string{}
	for i, ct := range c.td.ContainerDefinitions {
		seen := map[string]bool{}
		for j, d := range ct.DependsOn {
			path := fmt.Sprintf("containerDefinitions[%d].dependsOn[%d]", i, j)
			c.required(path+".condition", d.Condition)
			c.oneOf(path+".condition", d.Condition, "START", "COMPLETE", "SUCCESS", "HEALTHY")
			if !c.required(path+".containerName", d.ContainerName) {
				continue
			}
			on := byName[d.ContainerName]
			switch {
			case on == nil:
				c.problem(path+".containerName", "is %s, which is no container of the task", quote(d.ContainerName))
				continue
			case d.ContainerName == ct.Name:
				c.problem(path+".containerName", "is the container itself")
				continue
			case seen[d.ContainerName]:
				c.problem(path+".containerName", "is %s, which it depends on already", quote(d.ContainerName))
				continue
			case d.Condition == "HEALTHY" && on.HealthCheck == nil:
				c.problem(path+".condition", "is HEALTHY, but container %s has no healthCheck", quote(d.ContainerName))
			case (d.Condition == "COMPLETE" || d.Condition == "SUCCESS") && on.IsEssential():
				c.problem(path+".condition", "is %s, but container %s is essential: its exit ends the task; make it essential: false", d.Condition, quote(d.ContainerName))
			}
			seen[d.ContainerName] = true
			depends[ct.Name] = append(depends[ct.Name], d.ContainerName)
		}
		for _, v := range ct.VolumesFrom {
			if v.SourceContainer != ct.Name {
				volumes[ct.Name] = append(volumes[ct.Name], v.SourceContainer)
			}
		}
	}
	c.acyclic("dependsOn", depends)
	c.acyclic("volumesFrom", volumes)
}

// acyclic names one way round, if there is any.
func (c *taskDefinitionCheck) acyclic(field string, edges map[string][]string) {
	const visiting, done = 1, 2
	state := map[string]int{}
	var trail []string
	var visit func(name string) []string
	visit = func(name string) []string {
		switch state[name] {
		case done:
			return nil
		case visiting:
			for i, n := range trail {
				if n == name {
					return append(trail[i:len(trail):len(trail)], name)
				}
			}
		}
		state[name] = visiting
		trail = append(trail, name)
		for _, next := range edges[name] {
			if round := visit(next); round != nil {
				return round
			}
		}
		trail = trail[:len(trail)-1]
		state[name] = done
		return nil
	}
	for i, ct := range c.td.ContainerDefinitions {
		if round := visit(ct.Name); round != nil {
			c.problem(fmt.Sprintf("containerDefinitions[%d].%s", i, field), "goes round in a circle: %s", strings.Join(round, " -> "))
			return
		}
	}
}
