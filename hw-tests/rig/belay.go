package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Binaries is a directory laid out as `make build` leaves it.
type Binaries string

// Path of one program in it.
func (b Binaries) Path(name string) string { return filepath.Join(string(b), name) }

// Control is a control plane running as a process of its own.
type Control struct {
	*Process
	Bin  Binaries
	Dir  string // --data-dir
	Addr string // --listen
	args []string
	logs string
}

// StartControl starts a control plane on a free loopback port and waits until
// it is ready. Extra arguments are passed on.
func StartControl(ctx context.Context, bin Binaries, dir string, extra ...string) (*Control, error) {
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	c := &Control{Bin: bin, Dir: filepath.Join(dir, "control"), logs: dir, Addr: fmt.Sprintf("127.0.0.1:%d", port), args: extra}
	return c, c.Restart(ctx)
}

// Restart starts the control plane again over the same data.
func (c *Control) Restart(ctx context.Context) (err error) {
	args := append([]string{"serve", "--data-dir", c.Dir, "--listen", c.Addr}, c.args...)
	if c.Process, err = start(c.logs, "control", nil, c.Bin.Path("belay-control"), args...); err != nil {
		return err
	}
	return Until(ctx, c.Process, "the control plane to be ready", func() error {
		if _, err := os.Stat(filepath.Join(c.Dir, "admin.token")); err != nil {
			return err
		}
		_, err := c.CLI().Run(ctx, "cluster", "list", "--timeout", "2s")
		return err
	})
}

// CLI is the operator's command line pointed at this control plane.
func (c *Control) CLI() *CLI {
	token, _ := os.ReadFile(filepath.Join(c.Dir, "admin.token"))
	return &CLI{Path: c.Bin.Path("belay"), Env: []string{
		"BELAY_ADDR=" + c.Addr,
		"BELAY_TOKEN=" + strings.TrimSpace(string(token)),
		"BELAY_CA=" + filepath.Join(c.Dir, "ca.pem"),
	}}
}

// CLI runs the belay command.
type CLI struct {
	Path string
	Env  []string
}

// ExitError is a command that ended with another code than 0.
type ExitError struct {
	Args   []string
	Code   int
	Stderr string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("belay %s: exit %d: %s", strings.Join(e.Args, " "), e.Code, strings.TrimSpace(e.Stderr))
}

// Run runs one command and returns what it printed on stdout. The error is an
// *ExitError when the command ran and failed.
func (c *CLI) Run(ctx context.Context, args ...string) ([]byte, error) {
	return c.Pipe(ctx, nil, args...)
}

// Pipe is Run with something on stdin.
func (c *CLI) Pipe(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, c.Path, args...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return stdout.Bytes(), &ExitError{Args: args, Code: exit.ExitCode(), Stderr: stderr.String()}
	}
	return stdout.Bytes(), err
}

// JSON runs one command with -o json and decodes what it printed into v.
func (c *CLI) JSON(ctx context.Context, v any, args ...string) error {
	out, err := c.Run(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, v); err != nil {
		return fmt.Errorf("belay %s -o json printed what is not JSON: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// Task is a task as `belay task describe -o json` prints it.
type Task struct {
	ID            string      `json:"id"`
	LastStatus    string      `json:"lastStatus"`
	DesiredStatus string      `json:"desiredStatus"`
	Instance      string      `json:"instance"`
	StopCode      string      `json:"stopCode"`
	StoppedReason string      `json:"stoppedReason"`
	HealthStatus  string      `json:"healthStatus"`
	Note          string      `json:"note"`
	Containers    []Container `json:"containers"`
}

// Container is one container of a Task.
type Container struct {
	Name            string        `json:"name"`
	LastStatus      string        `json:"lastStatus"`
	ExitCode        *int          `json:"exitCode"`
	Reason          string        `json:"reason"`
	ImageDigest     string        `json:"imageDigest"`
	RuntimeID       string        `json:"runtimeId"`
	PID             int           `json:"pid"`
	Attempt         int           `json:"attempt"`
	Restarts        int           `json:"restarts"`
	HealthStatus    string        `json:"healthStatus"`
	NetworkBindings []PortBinding `json:"networkBindings"`
}

// PortBinding is a container port bound on the host.
type PortBinding struct {
	Protocol      string `json:"protocol"`
	ContainerPort int    `json:"containerPort"`
	HostPort      int    `json:"hostPort"`
}

// Container finds a container of the task by name.
func (t Task) Container(name string) (c Container) {
	for _, c = range t.Containers {
		if c.Name == name {
			return c
		}
	}
	return Container{}
}

// Describe reads one task.
func (c *CLI) Describe(ctx context.Context, id string) (t Task, err error) {
	return t, c.JSON(ctx, &t, "task", "describe", id)
}

// Await reads a task until ok says it is as expected.
func (c *CLI) Await(ctx context.Context, id, what string, within time.Duration, ok func(Task) bool) (t Task, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = Until(ctx, nil, what, func() error {
		now, err := c.Describe(ctx, id)
		if err != nil {
			return err
		}
		if t = now; !ok(t) {
			b, _ := json.Marshal(t)
			return fmt.Errorf("task is %s", b)
		}
		return nil
	})
	return t, err
}

// Agent is an agent running as a process of its own.
type Agent struct {
	*Process
	Bin               Binaries
	State, RunDir     string
	PluginDir         string
	ContainerdAddress string // empty: none
	Config            string // --config, when set
	Extra             []string
	Within            []string // a command that runs it, as Netns.Within
	logs              string
}

// Enroll enrols a new device with an activation code; run it with Restart.
func Enroll(ctx context.Context, bin Binaries, dir, code string, extra ...string) (*Agent, error) {
	a := &Agent{Bin: bin, State: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"), PluginDir: bin.Path("plugins"), logs: dir}
	args := append([]string{"enroll", "--state-dir", a.State, "--activation", code}, extra...)
	out, err := exec.CommandContext(ctx, bin.Path("belay-agent"), args...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("belay-agent enroll: %w\n%s", err, out)
	}
	return a, nil
}

// Restart starts the agent over its state and returns at once.
func (a *Agent) Restart() (err error) {
	args := []string{"run", "--state-dir", a.State, "--run-dir", a.RunDir, "--plugin-dir", a.PluginDir}
	if a.ContainerdAddress != "" {
		args = append(args, "--containerd-address", a.ContainerdAddress)
	}
	if a.Config != "" {
		args = append(args, "--config", a.Config)
	}
	line := slices.Concat(a.Within, []string{a.Bin.Path("belay-agent")}, args, a.Extra)
	a.Process, err = start(a.logs, "agent", nil, line[0], line[1:]...)
	return err
}

// Activate creates an activation and returns its code.
func (c *CLI) Activate(ctx context.Context, cluster string, limit int) (string, error) {
	var a struct {
		Code string `json:"code"`
	}
	err := c.JSON(ctx, &a, "activation", "create", "--cluster", cluster, "--limit", fmt.Sprint(limit), "--expires", "1h")
	return a.Code, err
}

// Connected waits until n instances of the cluster are connected with every
// named plugin ready, and returns their ids.
func (c *CLI) Connected(ctx context.Context, cluster string, n int, plugins ...string) (ids []string, err error) {
	err = Until(ctx, nil, fmt.Sprintf("%d instances to be connected", n), func() error {
		var l struct {
			Instances []struct {
				ID        string `json:"id"`
				Connected bool   `json:"connected"`
				Plugins   []struct {
					Name, State string
				} `json:"plugins"`
			} `json:"instances"`
		}
		if err := c.JSON(ctx, &l, "instance", "list", "--cluster", cluster); err != nil {
			return err
		}
		ids = nil
		for _, i := range l.Instances {
			ready := map[string]bool{}
			for _, p := range i.Plugins {
				ready[p.Name] = p.State == "ready"
			}
			ok := i.Connected
			for _, p := range plugins {
				ok = ok && ready[p]
			}
			if ok {
				ids = append(ids, i.ID)
			}
		}
		if len(ids) < n {
			return fmt.Errorf("%d of %d, instances are %+v", len(ids), n, l.Instances)
		}
		return nil
	})
	return ids, err
}

// RunTask registers a task definition, given as JSON, runs one task of it
// and returns its id.
func (c *CLI) RunTask(ctx context.Context, cluster, document string, extra ...string) (string, error) {
	out, err := c.Pipe(ctx, []byte(document), "taskdef", "register", "-f", "-", "-o", "json")
	if err != nil {
		return "", err
	}
	var td struct {
		Family   string `json:"family"`
		Revision int    `json:"revision"`
	}
	if err := json.Unmarshal(out, &td); err != nil {
		return "", fmt.Errorf("belay taskdef register printed what is not JSON: %w\n%s", err, out)
	}
	var run struct {
		Tasks    []Task            `json:"tasks"`
		Failures []json.RawMessage `json:"failures"`
	}
	args := append([]string{"task", "run", "--cluster", cluster, "--taskdef", fmt.Sprintf("%s:%d", td.Family, td.Revision)}, extra...)
	if err := c.JSON(ctx, &run, args...); err != nil {
		return "", err
	}
	if len(run.Tasks) != 1 {
		return "", fmt.Errorf("task run placed %d tasks: %s", len(run.Tasks), run.Failures)
	}
	return run.Tasks[0].ID, nil
}
