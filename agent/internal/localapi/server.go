package localapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxSocketPath = 107 // sun_path of unix(7), without the NUL
	requestTime   = 5 * time.Second
)

// Server answers on a unix socket.
type Server struct {
	source Source
	log    *slog.Logger
	ln     net.Listener
	path   string
	// Pulse is received from while the server waits; a server that does not
	// answer its own question ends with an error. Nil: it is not asked.
	Pulse <-chan struct{}
}

// Listen makes the socket in the run directory, which is made with mode 0700
// if it is missing. A socket left behind by a dead agent is replaced, one that
// is answered is an error.
func Listen(runDir string, source Source, log *slog.Logger) (*Server, error) {
	path, err := socketPath(runDir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	if err := removeDead(path); err != nil {
		return nil, err
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the local API: %w", err)
	}
	// Until here peer credentials alone keep others out.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("listen for the local API: %w", err)
	}
	return &Server{source: source, log: log, ln: ln, path: path}, nil
}

func socketPath(runDir string) (string, error) {
	path := filepath.Join(runDir, SocketName)
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("run directory %s is too long a path: a socket in it may have %d bytes: choose a shorter --run-dir", runDir, maxSocketPath)
	}
	return path, nil
}

// removeDead removes a socket nobody listens on.
func removeDead(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen for the local API: %w", err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen for the local API: %s is in the way and not a socket: remove it", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return fmt.Errorf("another agent is running with this run directory: %s is answered: stop it, or choose another --run-dir", path)
	}
	return os.Remove(path)
}

// Run serves until ctx ends. The socket is gone when it returns.
func (s *Server) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { s.answer(w, s.source.Status()) })
	mux.HandleFunc("GET /v1/tasks", func(w http.ResponseWriter, _ *http.Request) {
		tasks, err := s.source.Tasks()
		if err != nil {
			s.refuse(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		s.answer(w, map[string]any{"tasks": orEmpty(tasks)})
	})
	mux.HandleFunc("GET /v1/plugins", func(w http.ResponseWriter, _ *http.Request) {
		s.answer(w, map[string]any{"plugins": orEmpty(s.source.Plugins())})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.refuse(w, http.StatusNotFound, fmt.Sprintf("this agent does not know %s %s", r.Method, r.URL.Path))
	})
	srv := &http.Server{
		Handler:           s.authorize(mux),
		ConnContext:       withPeer,
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      requestTime,
		IdleTimeout:       requestTime,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          log.New(logWriter{s.log}, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(s.ln) }()
	for ctx.Err() == nil {
		select {
		case err := <-served:
			return fmt.Errorf("serve the local API: %w", err)
		case <-ctx.Done():
		case <-s.Pulse:
			if err := s.answers(); err != nil {
				return fmt.Errorf("the local API does not answer: %w", err)
			}
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	if srv.Shutdown(stop) != nil {
		_ = srv.Close()
	}
	<-served
	return nil
}

// answers asks the server something it has to refuse.
func (s *Server) answers() error {
	c, err := net.DialTimeout("unix", s.path, requestTime)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * requestTime)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("HEAD / HTTP/1.0\r\n\r\n")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Debug("local API", "error", string(b))
	return len(b), nil
}

// peerKey finds the caller's credentials in a request's context.
type peerKey struct{}

func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred)
}

// allowed tells who may ask: root and the user the agent runs as.
func allowed(cred *unix.Ucred, self int) bool {
	return cred != nil && (cred.Uid == 0 || int(cred.Uid) == self)
}

func (s *Server) authorize(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cred, _ := r.Context().Value(peerKey{}).(*unix.Ucred)
		if !allowed(cred, os.Geteuid()) {
			s.refuse(w, http.StatusForbidden, "only root and the agent's own user may ask the agent: use sudo")
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) answer(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		s.refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(b, '\n')) // a caller that left does not want it
}

func (s *Server) refuse(w http.ResponseWriter, code int, message string) {
	b, err := json.Marshal(failure{message})
	if err != nil {
		http.Error(w, message, code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n'))
}
