package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	for name, tt := range map[string]struct {
		args   []string
		plugin string
		code   int
		stdout string
		stderr string
	}{
		"link":          {args: []string{"/usr/libexec/belay/plugins/process"}, plugin: "process"},
		"argument":      {args: []string{"bin/belay-plugins", "process"}, plugin: "process"},
		"list":          {args: []string{"belay-plugins", "--list"}, stdout: "containerd\ndocker\nedgetpu\nprocess\n"},
		"version":       {args: []string{"belay-plugins", "--version"}, stdout: "dev\n"},
		"unknown":       {args: []string{"belay-plugins", "nothing"}, code: 2, stderr: `no plugin "nothing"`},
		"no argument":   {args: []string{"belay-plugins"}, code: 2, stderr: `no plugin "belay-plugins"`},
		"unknown link":  {args: []string{"/plugins/nothing"}, code: 2, stderr: "process"},
		"too many":      {args: []string{"belay-plugins", "process", "more"}, code: 2, stderr: "--list"},
		"nothing given": {args: nil, code: 2, stderr: "--list"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			p, code := choose(tt.args, &stdout, &stderr)
			if p == nil && tt.plugin != "" || p != nil && p.Info().Name != tt.plugin {
				t.Errorf("plugin = %v, want %q", p, tt.plugin)
			}
			if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("code %d, stdout %q, stderr %q; want %d, %q, %q", code, &stdout, &stderr, tt.code, tt.stdout, tt.stderr)
			}
		})
	}
}
