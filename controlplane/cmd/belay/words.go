package main

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

// shortID is enough of an id to name it by; the API takes unique prefixes.
func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// age says how long ago a moment of the API was, "-" when it has not been.
func (c *cli) age(rfc3339 string) string {
	t, err := time.Parse(time.RFC3339Nano, rfc3339)
	if err != nil {
		return "-"
	}
	return human(c.now().Sub(t))
}

// until says how far away a moment is.
func (c *cli) until(rfc3339 string) string {
	t, err := time.Parse(time.RFC3339Nano, rfc3339)
	if err != nil {
		return "-"
	}
	if d := t.Sub(c.now()).Round(time.Second); d > 0 {
		return "in " + human(d)
	}
	return human(c.now().Sub(t)) + " ago"
}

// since is a moment with its age.
func (c *cli) since(rfc3339 string) string {
	if rfc3339 == "" {
		return ""
	}
	return rfc3339 + " (" + c.until(rfc3339) + ")"
}

// human is a duration in its largest unit that still says something.
func human(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < 0:
		return "0s" // clocks differ a little
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/day)
}

func kib(n uint32) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d KiB", n)
}

// cpuCores writes CPU units as cores.
func cpuCores(units uint32) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", float64(units)/1024), "0"), ".")
}

func attributes(list []*apiv1.Attribute) string {
	out := make([]string, len(list))
	for i, a := range list {
		out[i] = a.GetName() + "=" + a.GetValue()
	}
	return strings.Join(out, ",")
}

// parseAttributes reads NAME=VALUE flags.
func parseAttributes(list []string) ([]*apiv1.Attribute, error) {
	var out []*apiv1.Attribute
	seen := map[string]bool{}
	for _, s := range list {
		name, v, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return nil, usagef("--attribute %q: must be NAME=VALUE", s)
		}
		if seen[name] {
			return nil, usagef("--attribute %q: %s is given twice", s, name)
		}
		seen[name] = true
		out = append(out, &apiv1.Attribute{Name: name, Value: v})
	}
	return out, nil
}

func dash(s string) string { return cmp.Or(s, "-") }
