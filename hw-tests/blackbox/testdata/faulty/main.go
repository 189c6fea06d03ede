// Command faulty is a plugin that misbehaves as its file is named: KIND-FAULT,
// KIND being rt or dev. Faults that end the process happen once in a run
// directory; "loop" always happens.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sdktest"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

var (
	name      = filepath.Base(os.Args[0])
	kind, bad = split(name)
	runDir    = os.Getenv("PLUGIN_UNIX_SOCKET_DIR")
)

func split(name string) (kind, fault string) {
	kind, fault, _ = strings.Cut(name, "-")
	return kind, fault
}

// once is true the first time it is called in this run directory.
func once() bool {
	f, err := os.OpenFile(filepath.Join(runDir, "happened"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		f.Close()
	}
	return err == nil
}

// healed is true from when the test says so.
func healed() bool {
	_, err := os.Stat(filepath.Join(runDir, "healed"))
	return err == nil
}

func main() {
	switch bad {
	case "socket":
		if once() {
			garbage()
		}
	case "line":
		if once() {
			fmt.Println("\x00\xff\x17 what is a handshake?")
			select {}
		}
	case "endless":
		if once() {
			for {
				_, _ = os.Stdout.Write([]byte(strings.Repeat("no line ends here ", 4096)))
			}
		}
	}
	p := &plugin{Memory: sdktest.NewMemory()}
	if kind == "dev" {
		serve.Main(detector{p})
	}
	serve.Main(runtime{p})
}

// garbage shakes hands and then talks rubbish.
func garbage() {
	path := filepath.Join(runDir, fmt.Sprint("host.", os.Getpid()))
	l, err := net.Listen("unix", path)
	if err != nil {
		os.Exit(9)
	}
	fmt.Printf("1|2|unix|%s|grpc|\n", path)
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(9)
		}
		go func() {
			b := make([]byte, 4096)
			for {
				for i := range b {
					b[i] = byte(rand.Int())
				}
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}()
	}
}

type plugin struct{ *sdktest.Memory }

func (p *plugin) Configure(context.Context, sdk.Config) error {
	after := func(f func()) { time.AfterFunc(300*time.Millisecond, f) }
	switch bad {
	case "hog":
		if once() {
			after(hog)
		}
	case "stderr":
		after(func() { flood(os.Stderr) })
	case "stdout":
		// serve.Main turns descriptor 1 to the log once the handshake is out.
		fd, err := syscall.Dup(1)
		if err != nil {
			return err
		}
		after(func() { flood(os.NewFile(uintptr(fd), "stdout")) })
	case "loop":
		after(func() { fmt.Fprintln(os.Stderr, "again and again"); os.Exit(5) })
	case "leaves":
		return leave()
	}
	return nil
}

// leave starts a child in this session and one in a session of its own, which
// has a child too.
func leave() error {
	for _, own := range []bool{false, true} {
		c := exec.Command("/bin/sh", "-c", "sleep 987 & echo $$ $! >"+filepath.Join(runDir, fmt.Sprint("left-", own))+"; wait")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: own}
		c.Stdout, c.Stderr = os.Stdout, os.Stderr // it holds the pipes, too
		if err := c.Start(); err != nil {
			return err
		}
	}
	return nil
}

// hog takes memory until it is killed.
func hog() {
	var all [][]byte
	for {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
		time.Sleep(time.Duration(len(all)/1024) * time.Millisecond)
	}
}

func flood(f *os.File) {
	line := []byte(strings.Repeat("x", 200) + "\n")
	for {
		if _, err := f.Write(line); err != nil {
			os.Exit(8)
		}
	}
}

// ail makes a call slow, if that is the fault.
func ail(ctx context.Context) {
	if bad != "slow" {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(12 * time.Second):
	}
}

func (p *plugin) info(k sdk.Kind) sdk.Info {
	return sdk.Info{Name: name, Version: "1", Kinds: []sdk.Kind{k}}
}

// detector has two devices.
type detector struct{ *plugin }

func (d detector) Info() sdk.Info       { return d.info(sdk.KindDevice) }
func (d detector) Devices() sdk.Devices { return d }

func (d detector) inventory(n int) []sdk.Device {
	a := map[string]string{"n": strconv.Itoa(n), "vendor": "acme", "model": "F-1", "driver": "none", "bus_id": "0000:01:00.0"}
	return []sdk.Device{{ID: name + "-a", Kind: "faulty", Ready: true, Attributes: a},
		{ID: name + "-b", Kind: "faulty", Ready: n%2 == 0, Reason: "every other time", Attributes: map[string]string{"memory_mib": "8192"}}}
}

// nonsense is what no inventory may be.
func (d detector) nonsense(n int) []sdk.Device {
	one := sdk.Device{ID: "x", Kind: "faulty", Ready: true}
	long := strings.Repeat("long ", 1<<18)
	switch n % 6 {
	case 0:
		return []sdk.Device{one, one}
	case 1:
		var many []sdk.Device
		for i := range 50_000 {
			many = append(many, sdk.Device{ID: strconv.Itoa(i), Kind: "faulty", Ready: true})
		}
		return many
	case 2:
		one.Kind = "No Kind\nof Thing"
	case 3:
		one.ID = long
	case 4:
		one.Attributes = map[string]string{"a": long}
	case 5:
		one.Ready, one.Reason = false, long
	}
	return []sdk.Device{one}
}

func (d detector) Watch(ctx context.Context, f func([]sdk.Device)) error {
	ail(ctx)
	every := time.Hour
	if bad == "changes" {
		every = time.Minute / 10_000
	}
	if bad == "nonsense" && !healed() {
		f(d.nonsense(int(time.Now().UnixMilli())))
		every = 100 * time.Millisecond
	} else {
		f(d.inventory(0))
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch {
		case bad == "nonsense" && !healed():
			f(d.nonsense(n))
		case bad != "changes" || !healed():
			f(d.inventory(n))
		}
	}
}

func (d detector) Edits(ctx context.Context, ids []string) (sdk.Edits, error) {
	ail(ctx)
	return sdk.Edits{Env: []string{"GOT=" + strings.Join(ids, ",")}}, nil
}

func (d detector) Stats(ctx context.Context, _ []string) ([]sdk.DeviceStats, error) {
	ail(ctx)
	return nil, sdk.Errorf(sdk.Unsupported, "stats", "nothing to measure")
}

// runtime is one whose containers are made up.
type runtime struct{ *plugin }

func (r runtime) Info() sdk.Info       { return r.info(sdk.KindRuntime) }
func (r runtime) Runtime() sdk.Runtime { return ailing{r.Memory} }

type ailing struct{ *sdktest.Memory }

func (a ailing) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	ail(ctx)
	info, err := a.Memory.Info(ctx)
	if bad == "nonsense" && !healed() {
		info.Version, info.Attributes = strings.Repeat("1.", 1<<20), map[string]string{"a": strings.Repeat("b", 1<<20)}
	}
	return info, err
}

func (a ailing) List(ctx context.Context) (sdk.Inventory, error) {
	ail(ctx)
	if bad != "nonsense" || healed() {
		return a.Memory.List(ctx)
	}
	one := sdk.Container{Attempt: sdk.Attempt{Task: "t", Container: "c", Number: 1}, State: sdk.StateRunning}
	switch rand.N(5) {
	case 0:
		return sdk.Inventory{Containers: []sdk.Container{one, one}}, nil
	case 1:
		var i sdk.Inventory
		for n := range 100_000 {
			one.Attempt.Number = n
			i.Containers = append(i.Containers, one)
		}
		return i, nil
	case 2:
		one.State = "levitating"
	case 3:
		one.RuntimeID = strings.Repeat("id", 1<<20)
	case 4:
		return sdk.Inventory{}, errors.New(strings.Repeat("no ", 1<<14))
	}
	return sdk.Inventory{Containers: []sdk.Container{one}}, nil
}

func (a ailing) Events(ctx context.Context, f func(sdk.Attempt)) error {
	for bad == "nonsense" && !healed() && ctx.Err() == nil {
		f(sdk.Attempt{Task: strings.Repeat("e", 1<<10)})
	}
	return a.Memory.Events(ctx, f)
}
