package sdk

import (
	"errors"
	"testing"
	"time"
)

// FuzzDecodeConfig: what somebody wrote into a file is refused as invalid or
// fills the struct; a configuration that passes the check can be decoded.
func FuzzDecodeConfig(f *testing.F) {
	type entry struct {
		Path string `json:"path"`
	}
	type config struct {
		Address string        `json:"address" default:"/run/d.sock"`
		Mode    string        `json:"mode" enum:"fast,safe"`
		Scan    time.Duration `json:"scan" default:"5s" min:"1" max:"60"`
		Count   int           `json:"count" min:"0" max:"100"`
		Port    uint16        `json:"port"`
		Share   float64       `json:"share" max:"1"`
		On      bool          `json:"on"`
		Names   []string      `json:"names"`
		Entries []entry       `json:"entries"`
	}
	for _, s := range []string{``, `{}`, `null`, `[]`, `{"scan":"2s","count":3,"names":["a"]}`, `{"count":1e2}`, `{"port":-1}`, `{"port":65536}`,
		`{"count":1.0}`, `{"scan":"9999999h"}`, `{"names":null}`, `{"entries":[{"path":1}]}`, `{"entries":{}}`, `{"mode":"slow"}`, `{"on":"yes"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var c config
		err := DecodeConfig(Config{JSON: b}, &c)
		switch {
		case err != nil && !errors.Is(err, Invalid):
			t.Errorf("%q: kind %q: %v", b, KindOf(err), err)
		case err == nil && (c.Scan < time.Second || c.Scan > time.Minute || c.Count < 0 || c.Count > 100 || c.Share > 1 || c.Mode != "" && c.Mode != "fast" && c.Mode != "safe"):
			t.Errorf("%q was taken: %+v", b, c)
		}
		if CheckConfig(OptionsOf(config{}), b) != nil && err == nil {
			t.Errorf("%q is wrong and was taken", b)
		}
	})
}
