package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

const defaultAddr = "127.0.0.1:7443"

// endpoint is where a control plane is and how to be let in.
type endpoint struct {
	addr  string
	token string
	ca    []byte // PEM; nil: the system's
	caWas string // where ca came from, for messages
}

type contextFile struct {
	Current  string                 `toml:"current"`
	Contexts map[string]contextSpec `toml:"contexts"`
}

type contextSpec struct {
	Addr      string `toml:"addr"`
	Token     string `toml:"token"`
	TokenFile string `toml:"token-file"`
	CA        string `toml:"ca"`
}

// resolve finds the endpoint: flags, a context named by flag, the environment,
// the current context.
func (f globalFlags) resolve(getenv func(string) string) (endpoint, error) {
	ctx, err := f.contextSpec(getenv)
	if err != nil {
		return endpoint{}, err
	}
	env := contextSpec{Addr: getenv("BELAY_ADDR"), Token: getenv("BELAY_TOKEN"), CA: getenv("BELAY_CA")}
	first, second := env, ctx
	if f.context != "" {
		first, second = ctx, env
	}
	e := endpoint{
		addr:  cmp.Or(f.addr, first.Addr, second.Addr, defaultAddr),
		caWas: cmp.Or(f.ca, first.CA, second.CA),
	}
	if err := checkAddr(e.addr); err != nil {
		return e, err
	}
	tokenFile := f.tokenFile
	for _, s := range []contextSpec{first, second} {
		if tokenFile == "" && e.token == "" {
			e.token, tokenFile = s.Token, s.TokenFile
		}
	}
	if tokenFile != "" {
		b, err := os.ReadFile(tokenFile)
		if err != nil {
			return e, fmt.Errorf("read the API token: %w", err)
		}
		e.token = string(b)
	}
	e.token = strings.TrimSpace(e.token)
	switch {
	case e.token == "":
		return e, errors.New("no API token: set BELAY_TOKEN, or give --token-file. belay-control writes the first one to admin.token in its data directory")
	case strings.ContainsFunc(e.token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return e, errors.New("the API token has characters that no token has: is it the content of admin.token?")
	}
	if e.caWas != "" {
		if e.ca, err = os.ReadFile(e.caWas); err != nil {
			return e, fmt.Errorf("read the control plane's CA: %w", err)
		}
	}
	return e, nil
}

func checkAddr(addr string) error {
	if strings.Contains(addr, "://") {
		return usagef("the control plane's address is %q; give host:port without %s", addr, addr[:strings.Index(addr, "://")+3])
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return usagef("the control plane's address is %q; it must be host:port, as in lab.example.com:7443", addr)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return usagef("the control plane's address is %q; the port must be from 1 to 65535", addr)
	}
	if host == "" || strings.ContainsAny(host, "/ @?#") {
		return usagef("the control plane's address is %q; %q is no host", addr, host)
	}
	return nil
}

func (f globalFlags) contextSpec(getenv func(string) string) (contextSpec, error) {
	path := getenv("BELAY_CONFIG")
	explicit := path != ""
	if !explicit {
		dir := getenv("XDG_CONFIG_HOME")
		if home := getenv("HOME"); dir == "" && home != "" {
			dir = filepath.Join(home, ".config")
		}
		if dir != "" {
			path = filepath.Join(dir, "belay", "config.toml")
		}
	}
	if path == "" {
		if f.context != "" {
			return contextSpec{}, errors.New("--context needs a context file, and neither BELAY_CONFIG nor HOME says where it is")
		}
		return contextSpec{}, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !explicit && f.context == "" {
		return contextSpec{}, nil
	}
	if err != nil {
		return contextSpec{}, fmt.Errorf("read the context file: %w", err)
	}
	var file contextFile
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&file); err != nil {
		return contextSpec{}, fmt.Errorf("context file %s: %w", path, tomlError(err))
	}
	name := cmp.Or(f.context, file.Current)
	if name == "" {
		return contextSpec{}, nil
	}
	spec, ok := file.Contexts[name]
	if !ok {
		return contextSpec{}, fmt.Errorf("context file %s: there is no context %q", path, name)
	}
	if spec.Token != "" && spec.TokenFile != "" {
		return contextSpec{}, fmt.Errorf("context file %s: context %q has both token and token-file", path, name)
	}
	for _, p := range []*string{&spec.TokenFile, &spec.CA} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	return spec, nil
}

// tomlError names the line and the key; the library says it in several lines.
func tomlError(err error) error {
	var strict *toml.StrictMissingError
	var decode *toml.DecodeError
	switch {
	case errors.As(err, &strict) && len(strict.Errors) > 0:
		e := strict.Errors[0]
		row, _ := e.Position()
		return fmt.Errorf("line %d: unknown key %q", row, strings.Join(e.Key(), "."))
	case errors.As(err, &decode):
		row, _ := decode.Position()
		return fmt.Errorf("line %d: %s", row, decode.Error())
	}
	return err
}
