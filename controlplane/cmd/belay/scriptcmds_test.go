package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// quiet takes the server's word on handshakes that are meant to fail.
var quiet = log.New(io.Discard, "", 0)

// runForCode is "rc CODE belay ARG...": the program must exit with the code.
func runForCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: rc CODE PROGRAM [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// narrow is "narrow FILE": no line has more than 80 columns.
func narrow(ts *testscript.TestScript, neg bool, args []string) {
	for _, line := range strings.Split(ts.ReadFile(args[0]), "\n") {
		if n := len([]rune(line)); n > 80 {
			ts.Fatalf("a line has %d columns: %s", n, line)
		}
	}
}

// plainText is "plain FILE": nothing in it moves a cursor.
func plainText(ts *testscript.TestScript, neg bool, args []string) {
	if strings.ContainsAny(ts.ReadFile(args[0]), "\r\x1b") {
		ts.Fatalf("%s has control characters, and is no terminal", args[0])
	}
}

// interrupt is "interrupt WORD FILE belay ARG...": once WORD is on standard
// error the program gets an interrupt, and must then exit with 130. FILE gets
// its standard error.
func interrupt(ts *testscript.TestScript, neg bool, args []string) {
	var path string
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if p := filepath.Join(dir, args[2]); path == "" && exec.Command(p, "version").Run() == nil {
			path = p
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args[3:]...)
	for _, name := range []string{"PATH", "HOME", "BELAY_ADDR", "BELAY_TOKEN", "BELAY_CA"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	stderr, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	var text strings.Builder
	for s := bufio.NewScanner(stderr); s.Scan(); {
		text.WriteString(s.Text() + "\n")
		if strings.Contains(s.Text(), args[0]) {
			ts.Check(cmd.Process.Signal(os.Interrupt))
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		ts.Fatalf("ended with %v, want exit code %d; standard error:\n%s", err, exitInterrupted, text.String())
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(text.String()), 0o600))
}

// otherCA is a certificate that signed nothing here.
func otherCA() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
