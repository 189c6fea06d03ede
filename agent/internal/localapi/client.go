package localapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// ErrNotRunning means that no agent answers on the socket.
var ErrNotRunning = errors.New("no agent is running here")

// maxAnswer bounds what the client takes from an agent.
const maxAnswer = 32 << 20

// Client asks the agent that runs with a run directory.
type Client struct {
	path string
	http *http.Client
}

// NewClient makes a client; it connects with each call.
func NewClient(runDir string) (*Client, error) {
	path, err := socketPath(runDir)
	if err != nil {
		return nil, err
	}
	return &Client{
		path: path,
		http: &http.Client{
			Timeout: 2 * requestTime,
			Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					d := net.Dialer{Timeout: time.Second}
					return d.DialContext(ctx, "unix", path)
				},
			},
		},
	}, nil
}

// Status of the agent. Errors: ErrNotRunning.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.get(ctx, "/v1/status", &s)
	return s, err
}

// Tasks the agent holds. Errors: ErrNotRunning.
func (c *Client) Tasks(ctx context.Context) ([]Task, error) {
	var body struct{ Tasks []Task }
	err := c.get(ctx, "/v1/tasks", &body)
	return body.Tasks, err
}

// Plugins of the device. Errors: ErrNotRunning.
func (c *Client) Plugins(ctx context.Context) ([]Plugin, error) {
	var body struct{ Plugins []Plugin }
	err := c.get(ctx, "/v1/plugins", &body)
	return body.Plugins, err
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing listens on %s: start it, or name its --run-dir", ErrNotRunning, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("ask the agent on %s: permission denied: use sudo", c.path)
	case err != nil:
		return fmt.Errorf("ask the agent on %s: %w", c.path, err)
	}
	defer resp.Body.Close()
	body := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		var f failure
		if body.Decode(&f) != nil || f.Error == "" {
			f.Error = resp.Status
		}
		return fmt.Errorf("ask the agent on %s: %s", c.path, f.Error)
	}
	if err := body.Decode(into); err != nil {
		return fmt.Errorf("ask the agent on %s: its answer is damaged: %w", c.path, err)
	}
	return nil
}
