package docker

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// daemonInfo is what is used of GET /info.
type daemonInfo struct {
	ServerVersion  string
	DefaultRuntime string
	Runtimes       map[string]json.RawMessage
	CgroupDriver   string
	CgroupVersion  string
	InitBinary     string
	CDISpecDirs    []string // of a daemon that knows CDI and is told to use it
	DockerRootDir  string
	MemoryLimit    bool
	SwapLimit      bool
	CPUShares      bool
	CPUCfsQuota    bool `json:"CpuCfsQuota"`
	PidsLimit      bool
	SecurityOptions,
	Warnings []string
	HTTPProxy      string `json:"HttpProxy"`
	HTTPSProxy     string `json:"HttpsProxy"`
	NoProxy        string
	RegistryConfig struct {
		InsecureRegistryCIDRs []string
		IndexConfigs          map[string]struct {
			Mirrors []string
			Secure  bool
		}
		Mirrors []string
	}
}

// cgroupVersion is "1" or "2"; daemons before 20.10 know only the first.
func (d *daemonInfo) cgroupVersion() string {
	if d.CgroupVersion == "" {
		return "1"
	}
	return d.CgroupVersion
}

// inspected is what is used of GET /containers/ID/json.
type inspected struct {
	ID    string `json:"Id"`
	Name  string
	State struct {
		Status     string
		Running    bool
		Paused     bool
		OOMKilled  bool
		Pid        int
		ExitCode   int
		Error      string
		StartedAt  string
		FinishedAt string
	}
	Config struct {
		Tty        bool
		StopSignal string
		Labels     map[string]string
	}
	NetworkSettings struct {
		Networks map[string]struct{ IPAddress string }
	}
}

// started tells whether the program has ever run.
func (c *inspected) started() bool {
	return c.State.Running || c.State.StartedAt != "" && !strings.HasPrefix(c.State.StartedAt, "0001-")
}

// ran is how long the program ran by the daemon's wall clock; 0 when it does not
// say, or that clock was set back meanwhile.
func (c *inspected) ran() time.Duration {
	start, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if err != nil {
		return 0
	}
	end, err := time.Parse(time.RFC3339Nano, c.State.FinishedAt)
	if err != nil {
		return 0
	}
	return max(0, end.Sub(start))
}

func (e *engine) info(ctx context.Context) (*daemonInfo, error) {
	var d daemonInfo
	return &d, e.call(ctx, request{method: http.MethodGet, path: "/info"}, &d)
}

func (e *engine) network(ctx context.Context, name string) (driver string, err error) {
	var n struct{ Driver string }
	err = e.call(ctx, request{method: http.MethodGet, path: "/networks/" + url.PathEscape(name)}, &n)
	return n.Driver, err
}

// list returns the ids of the containers with all these labels.
func (e *engine) list(ctx context.Context, labels ...string) ([]string, error) {
	filters, err := json.Marshal(map[string][]string{"label": labels})
	if err != nil {
		return nil, err
	}
	var found []struct {
		ID string `json:"Id"`
	}
	err = e.call(ctx, request{method: http.MethodGet, path: "/containers/json",
		query: url.Values{"all": {"1"}, "filters": {string(filters)}}}, &found)
	var ids []string
	for _, f := range found {
		ids = append(ids, f.ID)
	}
	return ids, err
}

func (e *engine) inspect(ctx context.Context, name string) (*inspected, error) {
	var c inspected
	if err := e.call(ctx, request{method: http.MethodGet, path: "/containers/" + name + "/json"}, &c); err != nil {
		return nil, err
	}
	return &c, nil
}

func (e *engine) create(ctx context.Context, name string, c *createRequest) error {
	return e.call(ctx, request{method: http.MethodPost, path: "/containers/create", query: url.Values{"name": {name}}, body: c}, nil)
}

func (e *engine) start(ctx context.Context, name string) error {
	return e.call(ctx, request{method: http.MethodPost, path: "/containers/" + name + "/start"}, nil)
}

func (e *engine) kill(ctx context.Context, name, signal string) error {
	return e.call(ctx, request{method: http.MethodPost, path: "/containers/" + name + "/kill", query: url.Values{"signal": {signal}}}, nil)
}

// wait registers a wait for the end of a container's program, and returns
// once that is done; the channel tells of the end.
func (e *engine) wait(ctx context.Context, name string) (<-chan error, error) {
	resp, err := e.send(ctx, request{method: http.MethodPost, path: "/containers/" + name + "/wait", query: url.Values{"condition": {"not-running"}}})
	if err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- readJSON(ctx, resp, &struct{}{}) }()
	return ended, nil
}

// remove deletes a container that does not run, and the volumes made for it.
func (e *engine) remove(ctx context.Context, name string) error {
	return e.call(ctx, request{method: http.MethodDelete, path: "/containers/" + name, query: url.Values{"v": {"1"}}}, nil)
}

// logs streams what a container has put out, from its very beginning.
func (e *engine) logs(ctx context.Context, name string, follow, timestamps bool) (io.ReadCloser, error) {
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}}
	if follow {
		q.Set("follow", "1")
	}
	if timestamps {
		q.Set("timestamps", "1")
	}
	resp, err := e.send(ctx, request{method: http.MethodGet, path: "/containers/" + name + "/logs", query: q})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// execed is what is used of GET /exec/ID/json.
type execed struct {
	Running  bool
	ExitCode *int
	Pid      int
}

func (e *engine) execCreate(ctx context.Context, name string, command, env []string) (id string, err error) {
	var made struct {
		ID string `json:"Id"`
	}
	err = e.call(ctx, request{method: http.MethodPost, path: "/containers/" + name + "/exec", body: map[string]any{
		"AttachStdout": true, "AttachStderr": true, "Cmd": command, "Env": env,
	}}, &made)
	return made.ID, err
}

func (e *engine) execStart(ctx context.Context, id string) (io.ReadCloser, error) {
	resp, err := e.send(ctx, request{method: http.MethodPost, path: "/exec/" + id + "/start", body: map[string]any{"Detach": false, "Tty": false}})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func (e *engine) execInspect(ctx context.Context, id string) (*execed, error) {
	var x execed
	return &x, e.call(ctx, request{method: http.MethodGet, path: "/exec/" + id + "/json"}, &x)
}

// imageExists tells whether a reference by digest is here.
func (e *engine) imageExists(ctx context.Context, ref string) (bool, error) {
	err := e.call(ctx, request{method: http.MethodGet, path: "/images/" + ref + "/json"}, &struct{}{})
	if isStatus(err, http.StatusNotFound) {
		return false, nil
	}
	return err == nil, err
}

// storedImage is what is used of GET /images/NAME/json.
type storedImage struct {
	ID   string `json:"Id"`
	Size int64
}

// image reads about an image; nil when there is none.
func (e *engine) image(ctx context.Context, ref string) (*storedImage, error) {
	var i storedImage
	err := e.call(ctx, request{method: http.MethodGet, path: "/images/" + ref + "/json"}, &i)
	if isStatus(err, http.StatusNotFound) {
		return nil, nil
	}
	return &i, err
}

// imagesInUse are the ids of the images that containers were made from, all
// containers and anybody's.
func (e *engine) imagesInUse(ctx context.Context) (map[string]bool, error) {
	var found []struct{ ImageID string }
	err := e.call(ctx, request{method: http.MethodGet, path: "/containers/json", query: url.Values{"all": {"1"}}}, &found)
	used := make(map[string]bool, len(found))
	for _, c := range found {
		used[c.ImageID] = true
	}
	return used, err
}

// removeImage drops one reference, and the image when that was the last.
func (e *engine) removeImage(ctx context.Context, ref string) error {
	return e.call(ctx, request{method: http.MethodDelete, path: "/images/" + ref}, nil)
}

func formatInt(n int64) string { return strconv.FormatInt(n, 10) }
