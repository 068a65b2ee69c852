package config

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	o, err := Parse([]string{
		"--data-dir=/var/lib/polymesh/observe/", "--socket=/run/polymesh/observe.sock", "--cluster-sockets=/run/polymesh/observe", "--disk=512MiB", "--memory=1GiB",
		"--retention=3d", "--kubeconfig=/var/lib/polymesh/server/cred/observe.kubeconfig", "--node-name=node-1.example", "--pod-log-dir=/var/log/pods",
		"--log-file=containerd=/var/lib/polymesh/agent/containerd/containerd.log", "--log-file=server=/var/log/a=b", "--spans-per-second=50", "--reserved-ports=6443,10250",
	}, nil)
	require.NoError(t, err)
	require.Equal(t, &Options{
		DataDir: "/var/lib/polymesh/observe", Socket: "/run/polymesh/observe.sock", ClusterSockets: "/run/polymesh/observe", Disk: 512 << 20, Memory: 1 << 30,
		Retention: 72 * time.Hour, Kubeconfig: "/var/lib/polymesh/server/cred/observe.kubeconfig", NodeName: "node-1.example", PodLogDir: "/var/log/pods",
		LogFiles:       []LogFile{{"containerd", "/var/lib/polymesh/agent/containerd/containerd.log"}, {"server", "/var/log/a=b"}},
		SpansPerSecond: 50, LinesPerSecond: 2000, Buffer: 64 << 20, ReservedPorts: []uint16{6443, 10250},
	}, o)
	require.Equal(t, 132_761, o.MaxSeries())
	require.Equal(t, int64(825_955_249), o.HeapLimit())

	o, err = Parse([]string{"--data-dir=/d"}, nil)
	require.NoError(t, err)
	require.Equal(t, 20_000, o.MaxSeries())
	require.Equal(t, int64(115_384_615), o.HeapLimit())
	require.Equal(t, &Options{DataDir: "/d", Socket: "/d/observe.sock", Memory: 150_000_000, Retention: 7 * 24 * time.Hour, SpansPerSecond: 200, LinesPerSecond: 2000, Buffer: 64 << 20}, o)

	o, err = Parse([]string{"--data-dir=/d", "--push-to=https://127.0.0.1:6444/p", "--push-ca=/a", "--push-cert=/c", "--push-key=/k", "--node-name=n", "--buffer=8MiB"}, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"https://127.0.0.1:6444/p", "/a", "/c", "/k", "8MiB"}, []string{o.PushTo, o.PushCA, o.PushCert, o.PushKey, o.Buffer.String()})
	require.Equal(t, int64(32<<20), o.HeapLimit())

	o, err = Parse([]string{"--data-dir=/d", "--read-only", "--socket=/s"}, nil)
	require.NoError(t, err)
	require.Equal(t, int64(math.MaxInt64), o.HeapLimit())
}

func TestRefused(t *testing.T) {
	long := "/" + strings.Repeat("x", 110)
	for args, want := range map[string]string{
		"":                                                      "--data-dir is missing",
		"--data-dir=d":                                          `--data-dir "d" is not an absolute path`,
		"--data-dir=/d --log=l":                                 `--log "l" is not an absolute path`,
		"--data-dir=/d --disk=1MiB":                             "--disk 1MiB is less than 64MiB",
		"--data-dir=/d --disk=much":                             "not a number of bytes such as 2GiB",
		"--data-dir=/d --disk=-2GiB":                            "not a number of bytes",
		"--data-dir=/d --disk=99999999T":                        "not a number of bytes",
		"--data-dir=/d --memory=100MiB":                         "--memory 100MiB is not between 150000000 and 1TiB",
		"--data-dir=/d --retention=23h":                         "--retention 23h is not between 1d and 10y",
		"--data-dir=/d --retention=week":                        "not a valid duration string",
		"--data-dir=/d --retention=99999999999999d":             "out of range",
		"--data-dir=/d --node-name=a/b":                         `--node-name "a/b" is not the name of a node`,
		"--data-dir=/d --log-file=/var/log/x":                   "is not NAME=PATH",
		"--data-dir=/d --log-file=a=x":                          "is not NAME=PATH",
		"--data-dir=/d --log-file=A=/x":                         "a name has small letters",
		"--data-dir=/d --socket=" + long:                        "at most 107 bytes",
		"--data-dir=/d --cluster-sockets=" + long[:92]:          "at most 107 bytes",
		"--data-dir=/d --spans-per-second=-1":                   "--spans-per-second -1",
		"--data-dir=/d --lines-per-second=0":                    "--lines-per-second 0",
		"--data-dir=/d --reserved-ports=65536":                  "65536 is not a port",
		"--data-dir=/d --kubelet-ca=/ca":                        "are given together",
		"--data-dir=/d --read-only":                             "choose --socket",
		"--data-dir=/d --read-only --socket=/s --log=/d/l":      "choose --socket, and --log, elsewhere",
		"--data-dir=/d --read-only --socket=/s --kubeconfig=/k": "does not go with --kubeconfig",
		"--data-dir=/d --read-only --socket=/s --log-file=a=/x": "does not go with --log-file",
		"--data-dir=/d --push-to=http://h/p":                    "is not an https URL",
		"--data-dir=/d --push-to=https://u:p@h/p":               "is not an https URL",
		"--data-dir=/d --push-to=https://h/p":                   "needs --push-ca",
		"--data-dir=/d --push-ca=/c":                            "go with --push-to",
		"--data-dir=/d --push-to=https://h/p --push-ca=/a --push-cert=/c --push-key=/k --node-name=n --kubeconfig=/k":         "does not go with --kubeconfig",
		"--data-dir=/d --push-to=https://h/p --push-ca=/a --push-cert=/c --push-key=/k --node-name=n --read-only --socket=/s": "does not go with --read-only",
		"--data-dir=/d --push-to=https://h/p --push-ca=/a --push-cert=/c --push-key=/k --node-name=n --buffer=1MiB":           "less than 8MiB",
		"--data-dir=/d here": `unexpected argument "here"`,
		"--dta-dir=/d":       "unknown flag: --dta-dir",
	} {
		_, err := Parse(strings.Fields(args), nil)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line with %q", args, err, want)
		}
	}
}

func TestHelp(t *testing.T) {
	var out bytes.Buffer
	_, err := Parse([]string{"--help"}, &out)
	if !errors.Is(err, pflag.ErrHelp) || !strings.Contains(out.String(), "--spans-per-second") {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestUnits(t *testing.T) {
	for text, want := range map[string]Size{
		"2GiB": 2 << 30, "2Gi": 2 << 30, "512MiB": 512 << 20, "1TiB": 1 << 40, "500TiB": 500 << 40, "3G": 3e9, "3GB": 3e9, "64k": 64000, "100": 100, "7B": 7,
	} {
		var s Size
		require.NoError(t, s.Set(text), text)
		require.Equal(t, want, s, text)
	}
	for want, s := range map[string]Size{"2GiB": 2 << 30, "1536MiB": 3 << 29, "1000000": 1e6, "0": 0} {
		require.Equal(t, want, s.String())
	}
	for _, text := range []string{"", "B", "-1", "1.5", "100m", "GiB", "2 Gi"} {
		var s Size
		require.Error(t, s.Set(text), text)
	}
}
