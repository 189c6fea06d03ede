package faults

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// watch follows tasks in the operator API, every change of them, for as long
// as the control plane keeps the stream.
func (s *site) watch(ctx context.Context, ids []string, changed func(apiTask)) error {
	token, err := os.ReadFile(filepath.Join(s.control.Dir, "admin.token"))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(filepath.Join(s.control.Dir, "ca.pem"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	question, err := json.Marshal(map[string]any{"ids": ids})
	if err != nil {
		return err
	}
	// Connect's streams: a byte of flags and four of length before each message.
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(question)))
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+s.control.Addr+"/belay.v1.Belay/WatchTasks", bytes.NewReader(append(body, question...)))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/connect+json")
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("WatchTasks: %s", resp.Status)
	}
	for {
		var head [5]byte
		if _, err := io.ReadFull(resp.Body, head[:]); err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(head[1:])
		if size > 4<<20 {
			return errors.New("WatchTasks: a message that is too long")
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(resp.Body, message); err != nil {
			return err
		}
		const end = 2
		if head[0]&end != 0 {
			return nil
		}
		var m struct{ Task apiTask }
		if err := json.Unmarshal(message, &m); err != nil {
			return err
		}
		changed(m.Task)
	}
}
