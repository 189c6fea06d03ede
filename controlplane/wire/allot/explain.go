package allot

import (
	"fmt"
	"strings"
)

// maxReasons bounds how many devices an explanation names.
const maxReasons = 3

// Explain says for a person why requests cannot be met by what is left; "" when
// each alone could be.
func (p *Pool) Explain(requests []Request) string {
	for i := range requests {
		if why := p.explain(&requests[i]); why != "" {
			return why
		}
	}
	if len(requests) == 0 {
		return ""
	}
	return "no choice of the free devices meets all requests together"
}

func (p *Pool) explain(r *Request) string {
	var other, unusable, used []string
	kind, matching, free := 0, 0, 0
	for i := range p.devices {
		d := &p.devices[i]
		if d.Kind != r.Kind {
			continue
		}
		kind++
		if lookup := d.lookup(); !r.Where.Match(lookup) {
			other = append(other, d.ID+": "+r.Where.Explain(lookup))
			continue
		}
		matching++
		shares := max(1, d.Shares)
		switch inUse := min(p.usage(i), shares); {
		case !d.Usable:
			unusable = append(unusable, d.ID+": "+d.Reason)
		case inUse < shares:
			free++
		default:
			used = append(used, d.ID)
		}
	}
	switch {
	case free >= r.Count:
		return ""
	case kind == 0:
		return fmt.Sprintf("no device of kind %s", r.Kind)
	case matching == 0:
		return fmt.Sprintf("no %s of %d for which %s (%s)", r.Kind, kind, r.Where, list(other))
	}
	of := fmt.Sprintf("%d device(s) of kind %s", matching, r.Kind)
	if len(other) > 0 {
		of += fmt.Sprintf(" for which %s", r.Where)
	}
	why := []string{}
	if len(used) > 0 {
		why = append(why, fmt.Sprintf("%d of %d in use", len(used), matching))
	}
	if len(unusable) > 0 {
		why = append(why, fmt.Sprintf("%d not ready (%s)", len(unusable), list(unusable)))
	}
	if len(why) == 0 {
		return fmt.Sprintf("%d wanted, %s", r.Count, of)
	}
	return fmt.Sprintf("%d wanted, %s: %s", r.Count, of, strings.Join(why, ", "))
}

// list shows the first few.
func list(items []string) string {
	if more := len(items) - maxReasons; more > 0 {
		return strings.Join(items[:maxReasons], "; ") + fmt.Sprintf("; and %d more", more)
	}
	return strings.Join(items, "; ")
}
