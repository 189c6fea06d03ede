package containerd

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/belay-edge/belay/plugins/sdk"
)

func TestParseConfig(t *testing.T) {
	for name, c := range map[string]struct{ json, want string }{
		"nothing":           {``, ""},
		"empty":             {`{}`, ""},
		"everything":        {`{"address":"/run/c.sock","namespace":"shop","runtime":"io.containerd.runc.v2","snapshotter":"native","registries":{"r.local:5000":{"plain_http":true,"username":"u","password":"p","mirrors":["m.local/cache"]}},"pull_concurrency":1,"cgroup_parent":"/belay/x","cni_bin_dirs":["/opt/cni/bin"],"bridge":{"name":"br7","subnet":"10.1.0.0/24","mtu":1400},"dns":["9.9.9.9"],"init_path":"/usr/bin/tini"}`, ""},
		"unknown key":       {`{"adress":"/run/c.sock"}`, `unknown field "adress"`},
		"unknown inner key": {`{"bridge":{"subnets":"x"}}`, `unknown field "subnets"`},
		"wrong type":        {`{"address":7}`, "address"},
		"not JSON":          {`{`, "unexpected EOF"},
		"more than one":     {`{} {}`, "something follows"},
		"relative address":  {`{"address":"c.sock"}`, "address"},
		"namespace":         {`{"namespace":"a b"}`, "namespace"},
		"long bridge name":  {`{"bridge":{"name":"sixteencharacter"}}`, "bridge.name"},
		"subnet with host":  {`{"bridge":{"subnet":"10.1.0.1/24"}}`, "bridge.subnet"},
		"tiny subnet":       {`{"bridge":{"subnet":"10.1.0.0/30"}}`, "bridge.subnet"},
		"IPv6 subnet":       {`{"bridge":{"subnet":"fd00::/64"}}`, "bridge.subnet"},
		"root cgroup":       {`{"cgroup_parent":"/"}`, "cgroup_parent"},
		"cgroup escapes":    {`{"cgroup_parent":"/a/../.."}`, "cgroup_parent"},
		"dns name":          {`{"dns":["one.one"]}`, "dns"},
		"no such CA":        {`{"registries":{"r":{"ca":"/no/such.pem"}}}`, "registries.r.ca"},
		"half credentials":  {`{"registries":{"r":{"username":"u"}}}`, "go together"},
		"plain and CA":      {`{"registries":{"r":{"plain_http":true,"skip_verify":true}}}`, "excludes"},
		"registry as URL":   {`{"registries":{"https://r":{}}}`, "host or host:port"},
		"mirror as URL":     {`{"registries":{"r":{"mirrors":["http://m"]}}}`, "mirrors"},
		"several at once":   {`{"address":"x","pull_concurrency":0}`, "pull_concurrency"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseConfig([]byte(c.json))
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (!errors.Is(err, sdk.Invalid) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want invalid with %q", err, c.want)
			}
		})
	}
}

func TestRegistryHidesPassword(t *testing.T) {
	r := Registry{Username: "jo", Password: "hush"}
	if s := fmt.Sprintf("%v %+v %#v %s", r, r, r, r); strings.Contains(s, "hush") {
		t.Errorf("it prints as %s", s)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"address":"/run/c.sock","registries":{"r":{"plain_http":true}}}`))
	f.Add([]byte(`{"bridge":{"subnet":"10.0.0.0/8"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseConfig(b); err == nil {
			if err := c.validate(); err != nil {
				t.Errorf("accepted and invalid: %v", err)
			}
		}
	})
}
