package query

import "testing"

// A placement asks once an instance, of which there may be tens of thousands.
func BenchmarkMatch(b *testing.B) {
	e, err := Parse(`attribute:memory_mib >= 8192 and attribute:vendor == nvidia and attribute:model =~ "Jetson.*"`)
	if err != nil {
		b.Fatal(err)
	}
	lookup := Attributes(map[string]string{"memory_mib": "16384", "vendor": "nvidia", "model": "Jetson Orin Nano"})
	for b.Loop() {
		e.Match(lookup)
	}
}

func BenchmarkParse(b *testing.B) {
	for b.Loop() {
		if _, err := Parse(`attribute:memory_mib >= 8192 and attribute:vendor == nvidia`); err != nil {
			b.Fatal(err)
		}
	}
}
