package query

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMatch(t *testing.T) {
	device := map[string]string{
		"vendor": "nvidia", "memory_mib": "16384", "load": "-0.5", "model": "Jetson Orin Nano", "none": "", "state": "unknown",
		"kernel": "4.9.253-tegra", "driver": "35.4", "cuda": "v12.2.140", "built": "2024-05-01", "cores": "8-core",
		"serial": "0012", "big": "18446744073709551616", "lines": "a\nb",
	}
	for _, c := range []struct {
		text string
		want bool
	}{
		{`attribute:vendor == nvidia`, true},
		{`attribute:vendor == NVIDIA`, false},
		{`attribute:vendor != intel`, true},
		{`attribute:vendor != nvidia`, false},
		{`attribute:none == ""`, true},
		{`attribute:model == "Jetson Orin Nano"`, true},
		// Equality is of text, as in ECS.
		{`attribute:serial == 12`, false},
		{`attribute:memory_mib == 16384.0`, false},

		{`attribute:memory_mib >= 8192`, true},
		{`attribute:memory_mib >= 16384`, true},
		{`attribute:memory_mib > 16384`, false},
		{`attribute:memory_mib <= 16384.0`, true},
		{`attribute:memory_mib < 16384.5`, true},
		{`attribute:memory_mib < 9`, false}, // not as text
		{`attribute:memory_mib > -20000`, true},
		{`attribute:load < 0`, true},
		{`attribute:load > -1`, true},
		{`attribute:load < -0.25`, true},
		{`attribute:load >= -0.50`, true},
		{`attribute:serial < 13`, true},
		{`attribute:big > 18446744073709551615`, true}, // no rounding
		{`attribute:big < 18446744073709551617`, true},
		// What is no number is neither more nor less.
		{`attribute:state >= 0`, false},
		{`attribute:state < 0`, false},
		{`attribute:none < 1`, false},
		{`attribute:cores >= 4`, false},
		{`not attribute:state >= 0`, true},

		{`attribute:kernel >= 4.9`, true},
		{`attribute:kernel >= 4.14`, false}, // parts are numbers: 9 is less than 14
		{`attribute:kernel < 4.14.0`, true},
		{`attribute:kernel >= 4`, true},
		{`attribute:kernel > -4`, false},
		{`attribute:cuda >= 12.10.0`, false},
		{`attribute:cuda >= v12.2`, true},
		{`attribute:driver >= 35.4.0`, true},
		{`attribute:driver > 35.10`, true}, // two parts on both sides: numbers
		{`attribute:driver > 35.10.0`, false},
		{`attribute:built > 2024-04-30`, true},
		{`attribute:built <= 2024-05-01T00:00:00Z`, true},
		{`attribute:built < 2024-05-01T00:00:00+01:00`, false},
		{`attribute:built > 2000`, false}, // a date is no number
		{`attribute:memory_mib > 2024-04-30`, false},

		{`attribute:vendor exists`, true},
		{`attribute:none exists`, true},
		{`attribute:vendor not_exists`, false},
		{`attribute:vendor in [amd, nvidia]`, true},
		{`attribute:vendor in [amd]`, false},
		{`attribute:vendor not_in [amd]`, true},
		{`attribute:vendor !in [nvidia]`, false},

		// A pattern must match all of the value.
		{`attribute:vendor =~ nvidia`, true},
		{`attribute:vendor =~ nvid`, false},
		{`attribute:vendor =~ nvid.*`, true},
		{`attribute:vendor =~ vidia`, false},
		{`attribute:vendor =~ amd|nvidia`, true},
		{`attribute:vendor =~ n|vidia`, false},
		{`attribute:vendor =~ (?i)NVIDIA`, true},
		{`attribute:vendor !~ nvid`, true},
		{`attribute:vendor !~ n.*a`, false},
		{`attribute:model =~ "Jetson (Orin|Xavier) .*"`, true},
		{`attribute:lines =~ a.b`, false},
		{`attribute:lines =~ a\sb`, true},
		{`attribute:lines =~ (?m)^a$`, false},
		{`attribute:driver =~ \Q35.4`, true},

		// Nothing holds for what is missing, but that it is.
		{`attribute:missing == nvidia`, false},
		{`attribute:missing != nvidia`, false},
		{`attribute:missing == ""`, false},
		{`attribute:missing < 1`, false},
		{`attribute:missing in [a]`, false},
		{`attribute:missing not_in [a]`, false},
		{`attribute:missing =~ .*`, false},
		{`attribute:missing !~ a`, false},
		{`attribute:missing exists`, false},
		{`attribute:missing not_exists`, true},
		{`not attribute:missing == nvidia`, true},
		{`task:group == nvidia`, false},

		{`attribute:vendor exists or attribute:missing exists and attribute:missing exists`, true},
		{`(attribute:vendor exists or attribute:missing exists) and attribute:missing exists`, false},
		{`not attribute:missing exists and attribute:vendor exists`, true},
		{`not attribute:vendor exists or attribute:vendor exists`, true},
		{`not (attribute:vendor exists or attribute:vendor exists)`, false},
	} {
		if got := parse(t, c.text).Match(Attributes(device)); got != c.want {
			t.Errorf("%s: %v, want %v", c.text, got, c.want)
		}
	}
}

func TestZeroExpressionAsksForNothing(t *testing.T) {
	var e Expr
	none := Attributes(nil)
	if !e.Match(none) || e.Explain(none) != "" || e.String() != "" || e.Names() != nil || !e.Equal(Expr{}) {
		t.Errorf("%v %q %q %q", e.Match(none), e.Explain(none), e.String(), e.Names())
	}
	if e.Equal(parse(t, "attribute:a exists")) {
		t.Error("equal to an expression that asks for something")
	}
}

func TestNames(t *testing.T) {
	e := parse(t, `attribute:vendor == nvidia and (agentVersion >= 1.0.0 or not attribute:a exists) and attribute:vendor exists`)
	if diff := cmp.Diff([]string{"agentVersion", "attribute:a", "attribute:vendor"}, e.Names()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestExplain(t *testing.T) {
	device := Attributes(map[string]string{"vendor": "nvidia", "memory_mib": "4096"})
	for _, c := range []struct{ text, want string }{
		{`attribute:vendor == nvidia`, ``},
		{`attribute:vendor == nvidia and attribute:memory_mib >= 8192 and attribute:x exists`, `attribute:memory_mib >= 8192: it is "4096"`},
		{`attribute:zone in [a, b]`, `attribute:zone in [a, b]: it has no zone`},
		{`agentVersion > 1`, `agentVersion > 1: it has no agentVersion`},
		{`attribute:vendor !exists`, `attribute:vendor not_exists: it has one`},
		{`attribute:vendor exists and (attribute:a exists or attribute:b exists)`, `attribute:a exists or attribute:b exists does not hold`},
		{`not attribute:vendor exists`, `not attribute:vendor exists does not hold`},
	} {
		if got := parse(t, c.text).Explain(device); got != c.want {
			t.Errorf("%s: %q, want %q", c.text, got, c.want)
		}
	}
}

// A lookup in live data may answer otherwise from one question to the next.
func TestExplainWithAnUnsteadyLookup(t *testing.T) {
	e := parse(t, `attribute:a == 1 and attribute:a == 2`)
	calls := 0
	e.Explain(func(string) (string, bool) {
		calls++
		return map[int]string{1: "0", 2: "1"}[calls], calls < 3
	})
	calls = 0
	e.Explain(func(string) (string, bool) {
		calls++
		return map[int]string{1: "0", 2: "1", 3: "2"}[calls], true
	})
}
