package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
	"github.com/belay-edge/belay/controlplane/internal/api/v1/apiv1connect"
	"github.com/belay-edge/belay/controlplane/internal/storetest"
	"github.com/belay-edge/belay/controlplane/wire"
)

const token = "a-token-for-tests"

// first places everything on the first instance.
func first(p controlplane.Placement, _ *mathrand.Rand) (ids []string, fs []controlplane.PlacementFailure) {
	if len(p.Candidates) == 0 {
		return nil, []controlplane.PlacementFailure{{Reason: controlplane.ReasonMissing, Detail: "none"}}
	}
	for range p.Count {
		ids = append(ids, p.Candidates[0].ID)
	}
	return ids, nil
}

// tunnels are always up, and have two lines of output.
type tunnels struct{}

func (tunnels) Session(string) (controlplane.Session, bool) {
	return controlplane.Session{Transport: "quic"}, true
}
func (tunnels) LastSeen(string) time.Time         { return time.Time{} }
func (tunnels) Disconnect(string, string, string) {}
func (tunnels) Rebind(string)                     {}
func (tunnels) Logs(_ context.Context, _ string, r *wire.LogsRequest, f func(*wire.Chunk) error) error {
	if err := f(&wire.Chunk{Stream: "stdout", Data: []byte("one " + r.TaskId)}); err != nil {
		return err
	}
	return f(&wire.Chunk{Stream: "stderr", Data: []byte("two")})
}

type fixture struct {
	*httptest.Server
	plane    *controlplane.Plane
	client   apiv1connect.BelayClient
	stopping chan struct{}
}

func serve(t *testing.T, authorize func(Principal, string, string) error) *fixture {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	p, err := controlplane.Open(t.Context(), controlplane.Config{
		Store: storetest.NewMemory(), Now: time.Now, Rand: rand.Reader, Place: first, Logger: log,
		Pepper: []byte("p"), Addresses: []string{"127.0.0.1:7443"},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.SetTunnels(tunnels{})
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{plane: p, stopping: make(chan struct{})}
	f.Server = httptest.NewUnstartedServer(NewHandler(Config{Plane: p, Token: token, Logger: log, Authorize: authorize, Stopping: f.stopping}))
	f.EnableHTTP2 = true
	f.StartTLS()
	t.Cleanup(func() { f.Close(); cancel(); done.Wait() })
	f.client = apiv1connect.NewBelayClient(f.Client(), f.URL, connect.WithInterceptors(bearer(token)))
	return f
}

// bearer adds a token to calls of either shape.
type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		r.Header().Set("Authorization", "Bearer "+string(b))
		return next(ctx, r)
	}
}
func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, s connect.Spec) connect.StreamingClientConn {
		c := next(ctx, s)
		c.RequestHeader().Set("Authorization", "Bearer "+string(b))
		return c
	}
}
func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func (f *fixture) post(t *testing.T, method, contentType, auth string, body []byte) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.URL+"/"+apiv1connect.BelayName+"/"+method, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	if auth != "" {
		r.Header.Set("Authorization", auth)
	}
	answer, err := f.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(b)
}

// Every RPC there is, now or later, asks whether the caller may, and does
// nothing if not.
func TestEveryCallIsAuthorised(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	f := serve(t, func(p Principal, action, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, action)
		return controlplane.Errorf(controlplane.Denied, "%s may not %s", p.Name, action)
	})
	take := func() []string {
		mu.Lock()
		defer mu.Unlock()
		was := asked
		asked = nil
		return was
	}
	seen := map[string]bool{}
	methods := apiv1.File_belay_proto.Services().ByName("Belay").Methods()
	for i := range methods.Len() {
		m := methods.Get(i)
		t.Run(string(m.Name()), func(t *testing.T) {
			contentType, body := "application/json", []byte("{}")
			if m.IsStreamingServer() {
				contentType, body = "application/connect+json", append(binary.BigEndian.AppendUint32([]byte{0}, 2), "{}"...)
			}
			_, answer := f.post(t, string(m.Name()), contentType, "Bearer "+token, body)
			was := take()
			if len(was) != 1 || seen[was[0]] || !strings.Contains(answer, "permission_denied") {
				t.Errorf("authorize was asked %q; the answer is %s", was, answer)
			}
			for _, a := range was {
				seen[a] = true
			}
			for _, auth := range []string{"", "Bearer wrong", "Bearer ", "Basic " + token, token} {
				if _, answer := f.post(t, string(m.Name()), contentType, auth, body); !strings.Contains(answer, "unauthenticated") || len(take()) > 0 {
					t.Errorf("with authorization %q: %s", auth, answer)
				}
			}
		})
	}
	if len(seen) != methods.Len() {
		t.Errorf("%d actions for %d methods", len(seen), methods.Len())
	}
}

func TestJSONSaysEverything(t *testing.T) {
	f := serve(t, nil)
	status, body := f.post(t, "ListInstances", "application/json", "Bearer "+token, []byte("{}"))
	var got map[string]any
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != http.StatusOK {
		t.Fatal(status, body, err)
	}
	if list, ok := got["instances"].([]any); !ok || len(list) != 0 || got["nextToken"] != "" {
		t.Errorf("an empty list is %s", body)
	}
	if status, body = f.post(t, "ListInstances", "application/json", "Bearer "+token, []byte(`{"clutser":"x"}`)); status != http.StatusBadRequest || !strings.Contains(body, "clutser") {
		t.Errorf("an unknown field: %d %s", status, body)
	}
}

func TestRequestTooLarge(t *testing.T) {
	f := serve(t, nil)
	_, err := f.client.RegisterTaskDefinition(t.Context(), connect.NewRequest(&apiv1.RegisterTaskDefinitionRequest{Document: strings.Repeat(" ", 2*maxRequest)}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("error %v, want resource_exhausted", err)
	}
}

func TestMessagesArriveIntact(t *testing.T) {
	f := serve(t, nil)
	_, err := f.client.DescribeTask(t.Context(), connect.NewRequest(&apiv1.DescribeTaskRequest{Id: "zz"}))
	if want := `invalid_argument: task "zz": want an id of 32 hex digits, or at least its first 4`; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	_, err = f.client.RegisterTaskDefinition(t.Context(), connect.NewRequest(&apiv1.RegisterTaskDefinitionRequest{Document: `{"family":"x","containerDefinitions":[{"nam":"x"}]}`}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "containerDefinitions[0]") {
		t.Errorf("error %v, want the field", err)
	}
}

func TestTaskOverTheAPI(t *testing.T) {
	f := serve(t, nil)
	ctx := t.Context()
	a, err := f.client.CreateActivation(ctx, connect.NewRequest(&apiv1.CreateActivationRequest{Cluster: "shop"}))
	if err != nil {
		t.Fatal(err)
	}
	code, err := wire.ParseActivationCode(a.Msg.Code)
	if err != nil {
		t.Fatal(err)
	}
	device, _, err := f.plane.Enroll(ctx, controlplane.Enrollment{ActivationID: code.ID, Secret: code.Secret, KeyFingerprint: strings.Repeat("ab", 32)})
	if err != nil {
		t.Fatal(err)
	}
	document := `{"family":"s","belay":{"runtime":"process"},"containerDefinitions":[{"name":"s","command":["/bin/sleep","600"]}]}`
	if _, err := f.client.RegisterTaskDefinition(ctx, connect.NewRequest(&apiv1.RegisterTaskDefinitionRequest{Document: document})); err != nil {
		t.Fatal(err)
	}
	run, err := f.client.RunTask(ctx, connect.NewRequest(&apiv1.RunTaskRequest{Cluster: "shop", TaskDefinition: "s:1", Count: 2, ClientToken: "t"}))
	if err != nil || len(run.Msg.Tasks) != 2 || run.Msg.Tasks[0].Instance != device.ID {
		t.Fatal(run, err)
	}
	task := run.Msg.Tasks[0]

	stream, err := f.client.WatchTasks(ctx, connect.NewRequest(&apiv1.WatchTasksRequest{Ids: []string{task.Id}}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().Task.LastStatus != "PROVISIONING" {
		t.Fatal(stream.Msg(), stream.Err())
	}
	zero := int32(0)
	if err := f.plane.ReportTask(ctx, device.ID, &wire.TaskStatus{TaskId: task.Id, LastStatus: "STOPPED", Containers: []*wire.ContainerStatus{{Name: "s", LastStatus: "STOPPED", ExitCode: &zero}}}); err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().Task.Containers[0].GetExitCode() != 0 || stream.Msg().Task.Containers[0].ExitCode == nil {
		t.Fatal(stream.Msg(), stream.Err())
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("after the end: %v, %v; want a quiet end", stream.Msg(), stream.Err())
	}

	list, err := f.client.ListTasks(ctx, connect.NewRequest(&apiv1.ListTasksRequest{Cluster: "shop", Read: &apiv1.Read{MinRevision: run.Msg.Revision, Consistent: true}}))
	if err != nil || len(list.Msg.Tasks) != 1 || list.Msg.Tasks[0].Id != run.Msg.Tasks[1].Id {
		t.Errorf("tasks wished RUNNING: %v, %v; want the second alone", list, err)
	}
	logs, err := f.client.TaskLogs(ctx, connect.NewRequest(&apiv1.TaskLogsRequest{Id: task.Id[:8]}))
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for logs.Receive() {
		text = append(text, logs.Msg().Stream+": "+string(logs.Msg().Data))
	}
	if got, want := strings.Join(text, "\n"), "stdout: one "+task.Id+"\nstderr: two"; got != want || logs.Err() != nil {
		t.Errorf("logs %q, %v; want %q", got, logs.Err(), want)
	}

	// A watch that has not seen its end says so when the server goes.
	second, err := f.client.WatchTasks(ctx, connect.NewRequest(&apiv1.WatchTasksRequest{Ids: []string{run.Msg.Tasks[1].Id}}))
	if err != nil || !second.Receive() {
		t.Fatal(err, second.Err())
	}
	close(f.stopping)
	if second.Receive() || connect.CodeOf(second.Err()) != connect.CodeUnavailable {
		t.Errorf("at shutdown: %v; want unavailable", second.Err())
	}
}

func TestHealth(t *testing.T) {
	f := serve(t, nil)
	answer, err := f.Client().Get(f.URL + "/healthz")
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatal(answer, err)
	}
	answer.Body.Close()
}
