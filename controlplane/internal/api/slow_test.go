package api

import (
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"time"
)

// A caller without a token that announced a body and never sent it held its
// connection for ever, and the port has only so many.
func TestCallersWithoutATokenDoNotHoldConnections(t *testing.T) {
	f := serve(t, nil)
	for name, head := range map[string]string{
		"a call":             "POST /belay.v1.Belay/ListTasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n",
		"the health check":   "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n",
		"a path there isn't": "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := tls.Dial("tcp", f.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, head); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("the connection was not ended: %v", err)
			}
		})
	}
}

func TestCallersWithATokenMayTakeTheirTime(t *testing.T) {
	t.Parallel()
	f := serve(t, nil)
	c, err := tls.Dial("tcp", f.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "POST /belay.v1.Belay/ListTasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+token+
		"\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	<-time.After(strangerPatience + time.Second/2)
	if _, err := io.WriteString(c, "}"); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer, err := io.ReadAll(c)
	if err != nil || !strings.Contains(string(answer), " 200 ") {
		t.Errorf("answer %q, %v", answer, err)
	}
}
