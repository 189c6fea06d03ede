package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/belay-edge/belay/controlplane/wire"
)

// defaultConfigFile is read if it is there and --config names no other.
const defaultConfigFile = "/etc/belay/control.toml"

// config is what a control plane can be told, by file and, above that, flags.
type config struct {
	DataDir       string   `toml:"data_dir"`
	Listen        string   `toml:"listen"`
	Advertise     []string `toml:"advertise"`
	EtcdEndpoints []string `toml:"etcd_endpoints"`
	LogLevel      string   `toml:"log_level"`
	// Registrations is how many devices may register in a second; 0: 500 for
	// each CPU. See docs/network.md.
	Registrations int `toml:"registrations_per_second"`
	// API is a certificate for the API of another CA than the control plane's.
	API struct {
		Certificate string `toml:"certificate"`
		Key         string `toml:"key"`
	} `toml:"api"`
}

func defaults() config {
	return config{DataDir: "/var/lib/belay-control", Listen: ":7443", LogLevel: "info"}
}

// readConfig merges defaults, file and flags.
func readConfig(args []string, stderr io.Writer) (config, error) {
	c := defaults()
	f := flag.NewFlagSet("belay-control serve", flag.ContinueOnError)
	f.SetOutput(stderr)
	file := f.String("config", "", "configuration `FILE` (TOML); "+defaultConfigFile+" if it exists")
	dataDir := f.String("data-dir", c.DataDir, "`DIR` of keys, admin token and store")
	listen := f.String("listen", c.Listen, "`HOST:PORT` for devices (TCP and UDP) and the API (TCP)")
	advertise := f.String("advertise", "", "`ADDR[,ADDR]` devices find this control plane at; the port may be left out (default: from --listen)")
	endpoints := f.String("etcd-endpoints", "", "`URL[,URL]` of an etcd cluster to use instead of the embedded store")
	level := f.String("log-level", c.LogLevel, "`LEVEL`: debug, info, warn or error")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return c, err
		}
		return c, &usageError{err}
	}
	if f.NArg() > 0 {
		return c, &usageError{fmt.Errorf("unexpected argument %q", f.Arg(0))}
	}
	if err := c.read(*file); err != nil {
		return c, err
	}
	f.Visit(func(set *flag.Flag) {
		switch set.Name {
		case "data-dir":
			c.DataDir = *dataDir
		case "listen":
			c.Listen = *listen
		case "advertise":
			c.Advertise = split(*advertise)
		case "etcd-endpoints":
			c.EtcdEndpoints = split(*endpoints)
		case "log-level":
			c.LogLevel = *level
		}
	})
	return c, c.validate()
}

func (c *config) read(file string) error {
	named := file != ""
	if !named {
		file = defaultConfigFile
	}
	b, err := os.ReadFile(file)
	if err != nil {
		if !named && errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("reading the configuration: %w", err)
	}
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(c)
	var unknown *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var keys []string
		for i := range unknown.Errors {
			line, _ := unknown.Errors[i].Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(unknown.Errors[i].Key(), "."), line))
		}
		return fmt.Errorf("%s: unknown key %s", file, strings.Join(keys, ", "))
	case errors.As(err, &bad):
		line, column := bad.Position()
		return fmt.Errorf("%s: line %d, column %d: %w", file, line, column, bad)
	case err != nil:
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

func split(s string) (parts []string) {
	for p := range strings.SplitSeq(s, ",") {
		if p = strings.TrimSpace(p); p != "" {
			parts = append(parts, p)
		}
	}
	return parts
}

func (c *config) validate() error {
	if c.DataDir == "" {
		return &usageError{errors.New("data-dir: must not be empty")}
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return &usageError{fmt.Errorf("listen: %q is not HOST:PORT", c.Listen)}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return &usageError{fmt.Errorf("listen: %q: the port must be a number up to 65535", c.Listen)}
	}
	if strings.ContainsAny(host, " /") {
		return &usageError{fmt.Errorf("listen: %q is not HOST:PORT", c.Listen)}
	}
	for _, a := range c.Advertise {
		if err := wire.CheckAddress(withPort(a, "1")); err != nil {
			return &usageError{fmt.Errorf("advertise: %w", err)}
		}
	}
	for _, e := range c.EtcdEndpoints {
		if u, err := url.Parse(e); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return &usageError{fmt.Errorf("etcd-endpoints: %q is not a URL as http://HOST:PORT", e)}
		}
	}
	if c.Registrations < 0 || c.Registrations > 1_000_000 {
		return &usageError{fmt.Errorf("registrations_per_second: %d: want 1 to 1000000, or 0 for 500 a CPU", c.Registrations)}
	}
	if (c.API.Certificate == "") != (c.API.Key == "") {
		return &usageError{errors.New("api: certificate and key go together")}
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return &usageError{fmt.Errorf("log-level: %q: want debug, info, warn or error", c.LogLevel)}
	}
	return nil
}

// withPort adds a port to a name or an IP address, which may be in brackets;
// anything else is returned as it is.
func withPort(addr, port string) string {
	host := strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
	if net.ParseIP(host) == nil && strings.ContainsAny(addr, ":[]") {
		return addr
	}
	return net.JoinHostPort(host, port)
}

// addresses is where devices find a control plane that listens on bound: what
// was configured, else where it listens, else every address of this machine.
func addresses(c config, bound net.Addr) []string {
	_, port, err := net.SplitHostPort(bound.String())
	if err != nil {
		return nil
	}
	var as []string
	for _, a := range c.Advertise {
		as = append(as, withPort(a, port))
	}
	if len(as) > 0 {
		return as
	}
	host, _, _ := net.SplitHostPort(c.Listen)
	if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
		return []string{net.JoinHostPort(host, port)}
	}
	for _, ip := range globalIPs() {
		as = append(as, net.JoinHostPort(ip.String(), port))
	}
	if len(as) == 0 {
		as = []string{net.JoinHostPort("127.0.0.1", port)}
	}
	return as
}

// globalIPs are this machine's addresses that others may reach, at most four:
// an activation code carries them, and has to be typed by some.
func globalIPs() (ips []net.IP) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && len(ips) < 4 {
			ips = append(ips, n.IP)
		}
	}
	return ips
}

// names is what the server's certificate is for.
func names(c config) []string {
	set := map[string]bool{}
	var out []string
	add := func(n string) {
		if n != "" && !set[n] {
			set[n] = true
			out = append(out, n)
		}
	}
	add("localhost")
	add("127.0.0.1")
	add("::1")
	if h, err := os.Hostname(); err == nil {
		add(h)
	}
	if host, _, err := net.SplitHostPort(c.Listen); err == nil {
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			for _, ip := range globalIPs() {
				add(ip.String())
			}
		} else {
			add(host)
		}
	}
	for _, a := range c.Advertise {
		host, _, err := net.SplitHostPort(withPort(a, "1"))
		if err == nil {
			add(host)
		}
	}
	return out
}
