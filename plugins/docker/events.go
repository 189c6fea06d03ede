package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"

	"github.com/belay-edge/belay/plugins/sdk"
)

const mostEvent = 256 << 10

// Events implements sdk.Runtime over the daemon's own event stream.
func (r *Runtime) Events(ctx context.Context, f func(sdk.Attempt)) error {
	const op = "watch containers"
	filters, err := json.Marshal(map[string][]string{
		"type": {"container"}, "label": {labelOwner + "=" + r.owner}, "event": {"start", "die", "oom", "destroy"},
	})
	if err != nil {
		return err
	}
	resp, err := r.engine.send(ctx, request{method: http.MethodGet, path: "/events", query: url.Values{"filters": {string(filters)}}})
	if err != nil {
		return r.fail(op, err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 4<<10), mostEvent)
	for lines.Scan() {
		var e struct {
			Actor struct{ Attributes map[string]string }
		}
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue
		}
		if a, err := attemptOf(e.Actor.Attributes); err == nil {
			f(a)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, bufio.ErrTooLong) {
		return r.fail(op, err)
	}
	return r.fail(op, &awayError{err})
}
