package node

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPodResolvConf(t *testing.T) {
	for host, want := range map[string]struct {
		servers []string
		text    string
	}{
		"nameserver 192.0.2.53\n":                                     {[]string{"192.0.2.53"}, "nameserver 192.0.2.53\n"},
		"search example.com\nnameserver\t192.0.2.53":                  {[]string{"192.0.2.53"}, "search example.com\nnameserver 192.0.2.53\n"},
		"nameserver 192.0.2.53 # the router\n":                        {[]string{"192.0.2.53"}, "nameserver 192.0.2.53\n"},
		"nameserver 192.0.2.53 192.0.2.54\n":                          {[]string{"192.0.2.53"}, "nameserver 192.0.2.53\n"},
		"nameserver 127.0.0.53\nnameserver 192.0.2.53\noptions rot\n": {[]string{"192.0.2.53"}, "nameserver 192.0.2.53\noptions rot\n"},
		"nameserver 127.0.0.53\noptions edns0\n":                      {nil, "options edns0\n"},
		"nameserver 2001:db8::53\nnameserver ::1\n":                   {[]string{"2001:db8::53"}, "nameserver 2001:db8::53\n"},
		"nameserver ::ffff:127.0.0.1\nnameserver 0.0.0.0\n":           {nil, ""},
		"nameserver fe80::1%eth0\nnameserver\nnameserver router\n":    {nil, ""},
		"# nameserver 192.0.2.53\n":                                   {nil, "# nameserver 192.0.2.53\n"},
		"":                                                            {nil, ""},
	} {
		servers, text := podResolvConf(host)
		if !slices.Equal(servers, want.servers) || text != want.text {
			t.Errorf("%q: %q, %q; want %q, %q", host, servers, text, want.servers, want.text)
		}
	}
}

// Name servers appear, change and disappear while the server runs.
func TestNameserversFollowTheHost(t *testing.T) {
	host := t.TempDir()
	first, second := filepath.Join(host, "resolv.conf"), filepath.Join(host, "systemd.conf")
	n := NewNameservers(settings(t, "-d", t.TempDir()).Node, slog.New(slog.DiscardHandler))
	n.hosts = []string{first, second}
	for _, step := range []struct {
		file, text string
		want       []string
	}{
		{"", "", nil},
		{first, "nameserver 127.0.0.53\n", nil},
		{second, "search lan\nnameserver 192.0.2.53 # dhcp\n", []string{"192.0.2.53"}},
		{first, "nameserver 198.51.100.1\nnameserver 198.51.100.2\n", []string{"198.51.100.1", "198.51.100.2"}},
		{first, "", []string{"192.0.2.53"}},
		{second, "", nil},
	} {
		if step.file != "" {
			if err := os.WriteFile(step.file, []byte(step.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.update(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(n.File())
		if err != nil {
			t.Fatal(err)
		}
		pods, _ := podResolvConf(string(text))
		if got := n.Servers(); !slices.Equal(got, step.want) || !slices.Equal(pods, step.want) {
			t.Errorf("with %s containing %q: %q, pods get %q; want %q", filepath.Base(step.file), step.text, got, pods, step.want)
		}
		if note := n.Note(); (note == "") != (len(step.want) > 0) {
			t.Errorf("with %s containing %q: the note is %q", filepath.Base(step.file), step.text, note)
		}
	}
}

// CoreDNS uses the same name servers as pods.
func TestNameserversOfTheUsersFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver 192.0.2.53\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--resolv-conf", file}, {"--kubelet-arg", "resolv-conf=" + file}, {"--kubelet-arg", "--resolv-conf=" + file, "--resolv-conf", "/none"},
	} {
		cfg := settings(t, append([]string{"-d", t.TempDir()}, args...)...)
		o := nodeOptions(cfg)
		if got := o.Nameservers.Servers(); !slices.Equal(got, []string{"192.0.2.53"}) {
			t.Errorf("%q: %q", args, got)
		}
		k := NewKubelet(o, nil)
		if err := k.parse(); err != nil {
			t.Fatal(err)
		}
		if want := o.Nameservers.File(); k.server.ResolverConfig != want && k.server.ResolverConfig != file {
			t.Errorf("%q: the kubelet reads %s", args, k.server.ResolverConfig)
		} else if strings.Contains(strings.Join(args, " "), "kubelet-arg") && k.server.ResolverConfig != file {
			t.Errorf("%q: the kubelet reads %s instead of the user's file", args, k.server.ResolverConfig)
		}
	}
}
