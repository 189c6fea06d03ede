package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// engine speaks the Engine API over the daemon's socket: the dozen and a half
// calls that are needed, and of their answers the fields that are used.
type engine struct {
	socket string
	http   *http.Client

	mu      sync.Mutex
	version string // of the API, as agreed with the daemon; "": not yet
}

// The versions of the API this client was written against. 1.40 is Docker
// 19.03, which JetPack 4 came with.
const (
	oldestAPI = "1.40"
	newestAPI = "1.51"
)

const (
	mostJSON  = 16 << 20 // bytes of one answer
	mostError = 64 << 10
)

func newEngine(socket string) *engine {
	return &engine{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", socket)
		},
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     20 * time.Second,
		DisableCompression:  true,
		ReadBufferSize:      4 << 10,
		WriteBufferSize:     2 << 10,
	}}}
}

// apiError is an answer of the daemon that is no success.
type apiError struct {
	Status  int
	Message string
}

func (e *apiError) Error() string { return e.Message }

func isStatus(err error, status int) bool {
	var e *apiError
	return errors.As(err, &e) && e.Status == status
}

// awayError is a daemon that cannot be spoken to.
type awayError struct{ error }

func (e *awayError) Unwrap() error { return e.error }

// request is one call. Body is sent as JSON when not nil.
type request struct {
	method, path string
	query        url.Values
	header       http.Header
	body         any
}

// send makes a call and returns an answer of success, whose body the caller
// closes.
func (e *engine) send(ctx context.Context, q request) (*http.Response, error) {
	for again := false; ; again = true {
		version, err := e.agree(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := e.once(ctx, "/v"+version, q)
		// Another daemon than the one agreed with may be there by now.
		if isStatus(err, http.StatusBadRequest) && strings.Contains(err.Error(), "client version") && !again {
			e.mu.Lock()
			e.version = ""
			e.mu.Unlock()
			continue
		}
		return resp, err
	}
}

func (e *engine) once(ctx context.Context, prefix string, q request) (*http.Response, error) {
	var body io.Reader
	if q.body != nil {
		b, err := json.Marshal(q.body)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	u := "http://docker" + prefix + q.path
	if len(q.query) > 0 {
		u += "?" + q.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, q.method, u, body)
	if err != nil {
		return nil, err
	}
	for k, v := range q.header {
		req.Header[k] = v
	}
	if q.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := e.http.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, &awayError{err}
	}
	if resp.StatusCode < 300 || resp.StatusCode == http.StatusNotModified {
		return resp, nil
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, mostError))
	var said struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(raw, &said) != nil || said.Message == "" {
		said.Message = strings.TrimSpace(string(raw))
	}
	if said.Message == "" {
		said.Message = resp.Status
	}
	failed := &apiError{resp.StatusCode, said.Message}
	if resp.StatusCode >= http.StatusInternalServerError && !e.listening(ctx) {
		return nil, &awayError{fmt.Errorf("the Docker daemon is ending, and answered: %w", failed)}
	}
	return nil, failed
}

// listening tells whether the daemon still takes calls. One that is shutting
// down does not, but for a while goes on answering on connections it has: what
// it says then ("failed to update store for object type *libnetwork.endpoint")
// is about itself, not about what was asked.
func (e *engine) listening(ctx context.Context) bool {
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", e.socket)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// call makes a call whose answer is one JSON value, or nothing of interest.
func (e *engine) call(ctx context.Context, q request, answer any) error {
	resp, err := e.send(ctx, q)
	if err != nil {
		return err
	}
	return readJSON(ctx, resp, answer)
}

func readJSON(ctx context.Context, resp *http.Response, answer any) error {
	defer resp.Body.Close()
	body := &io.LimitedReader{R: resp.Body, N: mostJSON}
	if answer != nil {
		if err := json.NewDecoder(body).Decode(answer); err != nil {
			switch {
			case context.Cause(ctx) != nil:
				return context.Cause(ctx)
			case body.N <= 0:
				return fmt.Errorf("the Docker daemon's answer is longer than %d bytes", mostJSON)
			}
			return &awayError{fmt.Errorf("read the answer: %w", err)}
		}
	}
	_, _ = io.Copy(io.Discard, body) // so that the connection can be used again
	return nil
}

// agree finds the version of the API to speak.
func (e *engine) agree(ctx context.Context) (string, error) {
	e.mu.Lock()
	known := e.version
	e.mu.Unlock()
	if known != "" {
		return known, nil
	}
	resp, err := e.once(ctx, "", request{method: http.MethodGet, path: "/version"})
	if err != nil {
		return "", err
	}
	var v struct{ Version, APIVersion, MinAPIVersion string }
	if err := readJSON(ctx, resp, &v); err != nil {
		return "", err
	}
	chosen := v.APIVersion
	if versionLess(newestAPI, chosen) {
		chosen = newestAPI
	}
	if versionLess(chosen, oldestAPI) || versionLess(chosen, v.MinAPIVersion) {
		return "", sdk.Errorf(sdk.Unsupported, "", "Docker %s speaks versions %s to %s of its API, this plugin %s to %s",
			v.Version, v.MinAPIVersion, v.APIVersion, oldestAPI, newestAPI).WithHint("Docker 19.03 or newer is needed")
	}
	e.mu.Lock()
	e.version = chosen
	e.mu.Unlock()
	return chosen, nil
}

// versionLess compares versions such as 1.9 and 1.40. What is no version is
// less than any.
func versionLess(a, b string) bool {
	major, minor := parseVersion(a)
	major2, minor2 := parseVersion(b)
	return major < major2 || major == major2 && minor < minor2
}

func parseVersion(v string) (major, minor int) {
	a, b, _ := strings.Cut(v, ".")
	major, _ = strconv.Atoi(a)
	minor, _ = strconv.Atoi(b)
	return major, minor
}
