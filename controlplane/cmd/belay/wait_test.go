package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

func TestOutcome(t *testing.T) {
	code := func(n int32) *int32 { return &n }
	container := func(essential bool, exit *int32) *apiv1.Container {
		return &apiv1.Container{Name: "c", Essential: essential, ExitCode: exit}
	}
	started := func(cs ...*apiv1.Container) *apiv1.Task {
		return &apiv1.Task{Id: "t", LastStatus: "STOPPED", StartedAt: "2026-01-02T03:04:05Z", Containers: cs}
	}
	never := func(cs ...*apiv1.Container) *apiv1.Task {
		return &apiv1.Task{Id: "t", LastStatus: "STOPPED", StoppedReason: "no such image", Containers: cs}
	}
	for _, tc := range []struct {
		name  string
		tasks []*apiv1.Task
		code  int
		why   string
	}{
		{"zero", []*apiv1.Task{started(container(true, code(0)))}, 0, ""},
		{"non-zero", []*apiv1.Task{started(container(true, code(7)))}, 7, "container c exited 7"},
		{"only the essential count", []*apiv1.Task{started(container(false, code(7)), container(true, code(0)))}, 0, ""},
		{"the first that is not zero", []*apiv1.Task{started(container(true, code(0)), container(true, code(143)))}, 143, "exited 143"},
		{"second task", []*apiv1.Task{started(container(true, code(0))), started(container(true, code(9)))}, 9, "exited 9"},
		{"never started", []*apiv1.Task{never(container(true, nil))}, 125, "did not start: no such image"},
		{"a code before none", []*apiv1.Task{never(container(true, nil)), started(container(true, code(2)))}, 2, "exited 2"},
		{"ended before it was seen running", []*apiv1.Task{never(container(true, code(0)))}, 0, ""},
		{"lost", []*apiv1.Task{started(container(true, nil))}, 125, "has no exit code"},
		{"out of a process's range", []*apiv1.Task{started(container(true, code(256)))}, 1, "exited 256"},
		{"nothing is known", []*apiv1.Task{never()}, 125, "did not start"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, why := outcome(tc.tasks)
			if code != tc.code || !strings.Contains(why, tc.why) || (tc.code == 0) != (why == "") {
				t.Errorf("outcome = %d, %q; want %d, %q", code, why, tc.code, tc.why)
			}
		})
	}
}

func TestPassingLinesTakeEachOthersPlaceOnATerminal(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(0, 0)
	c := &cli{stderr: &out, now: func() time.Time { return now }}
	p := &progress{c: c, terminal: true}
	p.say("PENDING")
	p.update("layer 1")
	p.update("layer 1")
	p.update(strings.Repeat("x", 100))
	p.say("RUNNING")
	p.done()
	want := "PENDING\n\r\x1b[Klayer 1\r\x1b[K" + strings.Repeat("x", 78) + "…\r\x1b[KRUNNING\n"
	if out.String() != want {
		t.Errorf("wrote %q\nwant  %q", out.String(), want)
	}

	out.Reset()
	p = &progress{c: c}
	p.update("layer 1")
	p.update("layer 2") // too soon
	now = now.Add(plainEvery)
	p.update("layer 3")
	if want := "layer 1\nlayer 3\n"; out.String() != want {
		t.Errorf("wrote %q, want %q", out.String(), want)
	}
}

func TestHuman(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m",
		47 * time.Hour: "47h", 48 * time.Hour: "2d", 400 * 24 * time.Hour: "400d",
	} {
		if got := human(d); got != want {
			t.Errorf("human(%s) = %q, want %q", d, got, want)
		}
	}
}

func FuzzYAMLToJSON(f *testing.F) {
	f.Add([]byte("family: web\ncontainerDefinitions:\n  - name: c\n    memory: 64\n"))
	f.Add([]byte("a: &x [1, .inf]\nb: *x\n"))
	f.Add([]byte("? [a]\n: 1\n"))
	f.Add([]byte("a: !!binary aGk=\n\"\": ~\n"))
	f.Add([]byte("&a [*a]"))
	f.Add([]byte("{}\n---\n{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		out, err := yamlToJSON(text)
		if err == nil && !json.Valid(out) {
			t.Errorf("%q became %q, which is no JSON", text, out)
		}
	})
}
