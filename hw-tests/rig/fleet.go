package rig

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Fleet is belay-sim: simulated devices in one process.
type Fleet struct {
	*Process
	Devices int
}

// FleetEvent is what the fleet tells of a session, or of all devices.
type FleetEvent struct {
	At        int64  `json:"at"` // Unix time, ns
	Device    int    `json:"device"`
	Up        *bool  `json:"up"`
	Transport string `json:"transport"`
	Enrolled  int    `json:"enrolled"`
	Connected int    `json:"connected"`
}

// StartFleet starts so many devices, which enrol and connect.
func StartFleet(ctx context.Context, c *Control, dir, cluster string, devices int, extra ...string) (*Fleet, error) {
	args := []string{"--devices", fmt.Sprint(devices)}
	for left := devices; left > 0; left -= 1000 {
		code, err := c.CLI().Activate(ctx, cluster, min(left, 1000))
		if err != nil {
			return nil, err
		}
		args = append(args, "--activation", code)
	}
	p, err := start(dir, "sim", nil, c.Bin.Path("belay-sim"), append(args, extra...)...)
	return &Fleet{p, devices}, err
}

// Events reads what the fleet has told so far.
func (f *Fleet) Events() ([]FleetEvent, error) {
	b, err := os.ReadFile(f.Log)
	if err != nil {
		return nil, err
	}
	var events []FleetEvent
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		var e FleetEvent
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.At > 0 {
			events = append(events, e)
		}
	}
	return events, lines.Err()
}

// Back are the moments at which each device was connected again after since,
// for good; those that are not are left out.
func (f *Fleet) Back(since time.Time) (back map[int]FleetEvent, err error) {
	events, err := f.Events()
	back = map[int]FleetEvent{}
	for _, e := range events {
		switch {
		case e.Up == nil || e.At < since.UnixNano():
		case *e.Up:
			back[e.Device] = e
		default:
			delete(back, e.Device)
		}
	}
	return back, err
}
