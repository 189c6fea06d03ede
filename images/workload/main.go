// Command workload is the program inside the test images: one static binary
// whose first argument says what to do. It exists so that tests can ask a
// container about itself without a shell.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: workload COMMAND [ARGUMENT]...
  print TEXT...            print the words and exit 0
  exit CODE [DELAY]        exit with CODE, after DELAY (a Go duration)
  sleep [DURATION]         sleep, or for ever; SIGTERM ends it with 143
  ignore SIGNAL...         sleep for ever, ignoring the signals
  trap SIGNAL CODE         sleep until SIGNAL, say so, exit with CODE
  tick INTERVAL [COUNT]    print numbered lines
  flood BYTES              print that many bytes as 64-byte lines
  info                     print what this process is, as JSON
  cat FILE                 print a file
  ls DIR                   print the names in a directory
  write FILE TEXT          write a file
  stdin                    copy standard input until it ends
  serve ADDR [TEXT]        answer HTTP with TEXT and the host's name
  get URL                  print what a URL answers
  dial NETWORK ADDR        connect, or exit 1 with the reason
  memory MIB               allocate and touch memory, then sleep
  cpu SECONDS              keep one core busy
  fork COUNT               start COUNT sleeping children, then sleep
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	code, err := run(os.Args[1], os.Args[2:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "workload %s: %v\n", os.Args[1], err)
		code = max(code, 1)
	}
	os.Exit(code)
}

var errArguments = errors.New("wrong arguments")

func run(command string, args []string) (int, error) {
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	switch command {
	case "print":
		fmt.Println(strings.Join(args, " "))
	case "exit":
		code, err := strconv.Atoi(arg(0))
		if err != nil {
			return 2, errArguments
		}
		return code, pause(arg(1))
	case "sleep":
		if arg(0) == "" {
			return 0, forever()
		}
		return 0, pause(arg(0))
	case "ignore":
		for _, name := range args {
			signal.Ignore(signalNamed(name))
		}
		fmt.Println("ready")
		return 0, forever()
	case "trap":
		return trap(arg(0), arg(1))
	case "tick":
		return 0, tick(arg(0), arg(1))
	case "flood":
		return 0, flood(arg(0))
	case "info":
		return 0, info()
	case "cat":
		b, err := os.ReadFile(arg(0))
		os.Stdout.Write(b)
		return 0, err
	case "ls":
		entries, err := os.ReadDir(arg(0))
		for _, e := range entries {
			fmt.Println(e.Name())
		}
		return 0, err
	case "write":
		return 0, os.WriteFile(arg(0), []byte(arg(1)), 0o644)
	case "stdin":
		_, err := io.Copy(os.Stdout, os.Stdin)
		return 0, err
	case "serve":
		return 1, serve(arg(0), arg(1))
	case "get":
		return 0, get(arg(0))
	case "dial":
		c, err := net.DialTimeout(arg(0), arg(1), 3*time.Second)
		if err == nil {
			c.Close()
		}
		return 0, err
	case "memory":
		return 0, memory(arg(0))
	case "cpu":
		return 0, cpu(arg(0))
	case "fork":
		return 0, fork(arg(0))
	default:
		fmt.Fprint(os.Stderr, usage)
		return 2, errors.New("no such command")
	}
	return 0, nil
}

func pause(d string) error {
	if d == "" {
		return nil
	}
	t, err := time.ParseDuration(d)
	if err != nil {
		return err
	}
	time.Sleep(t)
	return nil
}

func forever() error {
	c := make(chan os.Signal, 1)
	// The first process of a PID namespace ignores what it has no handler for.
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	if s, ok := (<-c).(syscall.Signal); ok {
		os.Exit(128 + int(s))
	}
	return nil
}

func signalNamed(name string) syscall.Signal {
	return map[string]syscall.Signal{
		"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "QUIT": syscall.SIGQUIT,
		"USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2,
	}[strings.TrimPrefix(name, "SIG")]
}

func trap(name, code string) (int, error) {
	n, err := strconv.Atoi(code)
	if err != nil || signalNamed(name) == 0 {
		return 2, errArguments
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, signalNamed(name))
	fmt.Println("ready")
	<-c
	fmt.Println("got " + name)
	return n, nil
}

func tick(interval, count string) error {
	d, err := time.ParseDuration(interval)
	if err != nil {
		return err
	}
	most := -1
	if count != "" {
		if most, err = strconv.Atoi(count); err != nil {
			return err
		}
	}
	for i := 1; most < 0 || i <= most; i++ {
		fmt.Printf("tick %d\n", i)
		time.Sleep(d)
	}
	return nil
}

func flood(bytes string) error {
	n, err := strconv.Atoi(bytes)
	if err != nil {
		return err
	}
	line := []byte(strings.Repeat("x", 63) + "\n")
	for ; n > 0; n -= len(line) {
		if _, err := os.Stdout.Write(line[:min(n, len(line))]); err != nil {
			return err
		}
	}
	return nil
}

// Info is what `workload info` prints.
type Info struct {
	PID, UID, GID int
	Groups        []int
	Cwd, Hostname string
	Args, Env     []string
	Status        map[string]string // of /proc/self/status: CapEff, NoNewPrivs, Seccomp, ...
	Limits        map[string][2]uint64
}

func info() error {
	i := Info{PID: os.Getpid(), UID: os.Getuid(), GID: os.Getgid(), Args: os.Args, Env: os.Environ(), Status: map[string]string{}, Limits: map[string][2]uint64{}}
	i.Groups, _ = os.Getgroups()
	slices.Sort(i.Groups)
	i.Cwd, _ = os.Getwd()
	i.Hostname, _ = os.Hostname()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && slices.Contains([]string{"CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "NSpid"}, k) {
			i.Status[k] = strings.TrimSpace(v)
		}
	}
	b, err = os.ReadFile("/proc/self/limits")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
			if f := strings.Fields(rest); len(f) >= 2 {
				soft, _ := strconv.ParseUint(f[0], 10, 64)
				hard, _ := strconv.ParseUint(f[1], 10, 64)
				i.Limits["nofile"] = [2]uint64{soft, hard}
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(i)
}

func serve(addr, text string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Printf("listening on %s\n", l.Addr())
	host, _ := os.Hostname()
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s\n", text, host, r.URL.Path)
	}))
}

func get(url string) error {
	c := http.Client{Timeout: 5 * time.Second}
	resp, err := c.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func memory(mib string) error {
	n, err := strconv.Atoi(mib)
	if err != nil {
		return err
	}
	held := make([][]byte, 0, n)
	for range n {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		held = append(held, b)
	}
	fmt.Printf("holding %d MiB\n", len(held))
	return forever()
}

func cpu(seconds string) error {
	n, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		return err
	}
	for end := time.Now().Add(time.Duration(n * float64(time.Second))); time.Now().Before(end); {
	}
	return nil
}

func fork(count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	for i := range n {
		if err := exec.Command("/proc/self/exe", "sleep").Start(); err != nil {
			return fmt.Errorf("child %d: %w", i+1, err)
		}
	}
	fmt.Printf("started %d\n", n)
	return forever()
}
