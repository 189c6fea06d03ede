package docker

import (
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"
)

// A daemon that is told to end closes its socket first and then answers, on
// the connections it has, that its own store is gone. That was taken for the
// verdict on a task.
func TestDaemonThatEndsIsAway(t *testing.T) {
	for _, c := range []struct {
		name string
		ends bool
	}{{"ends", true}, {"stays", false}} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if c.ends {
					_ = ln.Close()
				}
				w.WriteHeader(http.StatusInternalServerError)
				_, _ = w.Write([]byte(`{"message":"failed to update store for object type *libnetwork.endpoint: open : no such file or directory"}`))
			})}
			go func() { _ = srv.Serve(ln) }()
			defer srv.Close()
			_, err = newEngine(socket).once(t.Context(), "", request{method: http.MethodPost, path: "/containers/x/start"})
			var away *awayError
			if errors.As(err, &away) != c.ends {
				t.Errorf("%v", err)
			}
		})
	}
}
