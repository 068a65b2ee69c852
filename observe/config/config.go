// Package config turns the command line of polymesh-observe into checked Options.
//
// It owns the names, defaults and rules of every setting. The program has no config file and reads no environment: the server that
// supervises it (pkg/observe in the main module) compares the whole command line with its own, and starts the program again when
// they differ.
package config

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/spf13/pflag"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// Limits of the settings.
const (
	// MinDisk is the smallest store: two blocks of metrics and a day of a small cluster's logs.
	MinDisk Size = 64 << 20
	// The default is DefaultDisk, or the disk divided by DefaultShare if that is less.
	DefaultDisk  Size = 2 << 30
	DefaultShare      = 20 // one twentieth
	// MinMemory is the memory of a store with scrapeconfig.DefaultSeries. Each seriesBytes more are enough for another one: about half of it is the series
	// itself, and the rest is for queries of many.
	MinMemory   Size = 150_000_000
	seriesBytes      = 8 << 10
	maxMemory   Size = 1 << 40
	// MinRetention is a day: logs and traces are kept in whole days.
	MinRetention = 24 * time.Hour
	maxRetention = 10 * 365 * 24 * time.Hour
	// maxSocket is the longest path of a socket: sun_path holds 108 bytes with the end (unix(7)).
	maxSocket = 107
	maxRate   = 1_000_000
)

// LogFile is a log of the platform that is stored with the containers' logs.
type LogFile struct {
	// Name is the value of the label "container": server, containerd.
	Name string
	// Path is an absolute path. The file need not exist.
	Path string
}

// Options are the checked settings.
type Options struct {
	// DataDir contains everything that is stored.
	DataDir string
	// Socket serves everything, to root only.
	Socket string
	// ClusterSockets is the folder of the sockets for pods, one for each API; empty for none.
	ClusterSockets string
	// Disk is how many bytes all of it may take; 0 for Default.
	Disk Size
	// Memory is how many bytes of memory the process may use. The server enforces it; the limits on metrics and Go's heap follow it (MaxSeries,
	// HeapLimit).
	Memory Size
	// Retention is how long it is kept.
	Retention time.Duration
	// Kubeconfig is the file with the program's own identity. It need not exist yet. Without it (empty), the cluster is not observed.
	Kubeconfig string
	// KubeletCA is the authority of the kubelets' certificates, KubeletCert and KubeletKey the program's own identity for them. All are empty
	// if kubelets are not scraped.
	KubeletCA, KubeletCert, KubeletKey string
	// ServerSocket is the socket on which the server serves its own metrics; empty for none.
	ServerSocket string
	// NodeName is this machine's node; the label "node" of everything that is read here.
	NodeName string
	// PodLogDir is the kubelet's folder of containers' logs; empty for none.
	PodLogDir string
	LogFiles  []LogFile
	// SpansPerSecond is how many spans are stored on average; whole traces above it are dropped and counted.
	SpansPerSecond int
	// LinesPerSecond is how many lines of each pod are stored; lines above it are dropped and counted.
	LinesPerSecond int
	// ReservedPorts are the platform's own ports on this machine, to which jobs of users must not connect.
	ReservedPorts []uint16
	// RemoteWrite lets others write metrics.
	RemoteWrite bool
	// ReadOnly serves what is stored and records nothing. The data dir is not changed: necessary copies are made beside the socket.
	ReadOnly bool
	// PushTo is the URL to which the program sends what it reads on this machine; it then only buffers. It is empty for a store. PushCA is the
	// authority of the certificate there, PushCert and PushKey are the node's own, and Buffer is the largest number of bytes that wait.
	PushTo, PushCA, PushCert, PushKey string
	Buffer                            Size
	// Log is the file of the program's own log, which it rotates; empty for standard error.
	Log   string
	Debug bool
	// Version is set if the program only prints its version.
	Version bool
}

// Parse reads the arguments after the program's name. It returns pflag.ErrHelp, after it has written the help to out, if that was
// requested.
func Parse(args []string, out io.Writer) (*Options, error) {
	o := &Options{}
	var files []string
	f := pflag.NewFlagSet("polymesh-observe", pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {}
	f.StringVar(&o.DataDir, "data-dir", "", "folder of everything that is stored")
	f.StringVar(&o.Socket, "socket", "", "UNIX socket that serves everything, to root (default: observe.sock in the data dir)")
	f.StringVar(&o.ClusterSockets, "cluster-sockets", "", "folder of the sockets for pods, one for each API (default: none)")
	f.Var(&o.Disk, "disk", "how much of the disk it may take, such as 2GiB (default: 2GiB, or a twentieth of the disk if that is less)")
	o.Memory = MinMemory
	f.Var(&o.Memory, "memory", "how much memory the limits on metrics and on the heap are made for; who starts the program limits the process to it")
	o.Retention = 7 * 24 * time.Hour
	f.Var((*model.Duration)(&o.Retention), "retention", "how long it is kept, such as 7d or 36h; less if --disk is reached before")
	f.StringVar(&o.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster; it may appear later (default: none)")
	f.StringVar(&o.KubeletCA, "kubelet-ca", "", "file of the authority that has signed the kubelets' certificates (default: kubelets are not asked)")
	f.StringVar(&o.KubeletCert, "kubelet-cert", "", "file of the program's certificate for kubelets")
	f.StringVar(&o.KubeletKey, "kubelet-key", "", "file of the key of that certificate")
	f.StringVar(&o.ServerSocket, "server-socket", "", "UNIX socket on which the server serves its metrics (default: none)")
	f.StringVar(&o.NodeName, "node-name", "", "name of this machine's node")
	f.StringVar(&o.PodLogDir, "pod-log-dir", "", "the kubelet's folder of containers' logs, usually /var/log/pods (default: none)")
	f.StringArrayVar(&files, "log-file", nil, "another log to store, NAME=PATH; may be repeated")
	f.IntVar(&o.SpansPerSecond, "spans-per-second", 200, "how many spans are stored, averaged over a minute; whole traces above it are dropped")
	f.IntVar(&o.LinesPerSecond, "lines-per-second", 2000, "how many log lines of a pod are stored; lines above it are dropped")
	ports := f.IntSlice("reserved-ports", nil, "TCP ports of the platform on this machine, to which no job of a user connects")
	f.BoolVar(&o.RemoteWrite, "remote-write", false, "accept metrics by Prometheus' remote write")
	f.BoolVar(&o.ReadOnly, "read-only", false, "serve what is stored, record nothing, and change no file in the data dir")
	f.StringVar(&o.PushTo, "push-to", "", "https URL of an API server to which what is read on this machine is sent; nothing is stored then (default: none)")
	f.StringVar(&o.PushCA, "push-ca", "", "file of the authority that has signed the API server's certificate")
	f.StringVar(&o.PushCert, "push-cert", "", "file of this node's certificate")
	f.StringVar(&o.PushKey, "push-key", "", "file of the key of that certificate")
	o.Buffer = 64 << 20
	f.Var(&o.Buffer, "buffer", "how much waits on the disk while the API server does not answer")
	f.StringVar(&o.Log, "log", "", "file of the program's own log (default: standard error)")
	f.BoolVar(&o.Debug, "debug", false, "log debugging messages")
	f.BoolVar(&o.Version, "version", false, "print the version")
	err := f.Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(out, "Stores and serves metrics, logs and traces of a cluster.\n\nUsage: polymesh-observe --data-dir DIR [flags]\n\n%s", f.FlagUsages())
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w (see polymesh-observe --help)", err)
	case f.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q: polymesh-observe takes flags only", f.Arg(0))
	case o.Version:
		return o, nil
	}
	if len(files) > maxLogFiles {
		return nil, fmt.Errorf("--log-file is given %d times, and may be %d times", len(files), maxLogFiles)
	}
	for _, port := range *ports {
		if port < 1 || port > math.MaxUint16 {
			return nil, fmt.Errorf("--reserved-ports: %d is not a port", port)
		}
		o.ReservedPorts = append(o.ReservedPorts, uint16(port))
	}
	for _, text := range files {
		file, err := parseLogFile(text)
		if err != nil {
			return nil, err
		}
		o.LogFiles = append(o.LogFiles, file)
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	return o, nil
}

// MaxSeries is how many series of metrics the memory is enough for.
func (o *Options) MaxSeries() int {
	return scrapeconfig.DefaultSeries + int((o.Memory-MinMemory)/seriesBytes)
}

// collectorHeap is HeapLimit of a program that only sends. The server limits it to 60 MB, most of which is the program itself.
const collectorHeap = 32 << 20

// HeapLimit is the limit of the memory of Go's runtime (GOMEMLIMIT), in bytes. It is 10/13 of a store's memory: the rest is for files that are
// mapped, and for the program itself. Files that no one writes may have more series than a store, and their reader sets its own limit.
func (o *Options) HeapLimit() int64 {
	switch {
	case o.ReadOnly:
		return math.MaxInt64
	case o.PushTo != "":
		return collectorHeap
	}
	return int64(o.Memory) * 10 / 13
}

func (o *Options) check() error {
	if o.Memory < MinMemory || o.Memory > maxMemory {
		return fmt.Errorf("--memory %s is not between %s and %s", o.Memory, MinMemory, maxMemory)
	}
	if o.DataDir == "" {
		return errors.New("--data-dir is missing: name the folder of everything that is stored")
	}
	if o.Socket == "" {
		o.Socket = filepath.Join(o.DataDir, "observe.sock")
	}
	for _, path := range []struct {
		flag  string
		value *string
	}{
		{"data-dir", &o.DataDir}, {"socket", &o.Socket}, {"cluster-sockets", &o.ClusterSockets}, {"kubeconfig", &o.Kubeconfig},
		{"pod-log-dir", &o.PodLogDir}, {"log", &o.Log}, {"server-socket", &o.ServerSocket},
		{"kubelet-ca", &o.KubeletCA}, {"kubelet-cert", &o.KubeletCert}, {"kubelet-key", &o.KubeletKey},
		{"push-ca", &o.PushCA}, {"push-cert", &o.PushCert}, {"push-key", &o.PushKey},
	} {
		if *path.value == "" {
			continue
		}
		// A relative path would depend on how the program was started.
		if !filepath.IsAbs(*path.value) {
			return fmt.Errorf("--%s %q is not an absolute path", path.flag, *path.value)
		}
		*path.value = filepath.Clean(*path.value)
	}
	for flag, path := range map[string]string{"socket": o.Socket, "cluster-sockets": filepath.Join(o.ClusterSockets, LongestSocket)} {
		if len(path) > maxSocket {
			return fmt.Errorf("--%s: the path of a socket has at most %d bytes, and %s has %d", flag, maxSocket, path, len(path))
		}
	}
	if (o.KubeletCA == "") != (o.KubeletCert == "") || (o.KubeletCA == "") != (o.KubeletKey == "") {
		return errors.New("--kubelet-ca, --kubelet-cert and --kubelet-key are given together, or not at all")
	}
	if o.ReadOnly {
		for flag, given := range map[string]bool{
			"cluster-sockets": o.ClusterSockets != "", "kubeconfig": o.Kubeconfig != "", "pod-log-dir": o.PodLogDir != "", "remote-write": o.RemoteWrite,
			"log-file": len(o.LogFiles) > 0, "server-socket": o.ServerSocket != "", "kubelet-ca": o.KubeletCA != "",
		} {
			if given {
				return fmt.Errorf("--read-only records nothing, so it does not go with --%s", flag)
			}
		}
		if within(o.DataDir, o.Socket) || within(o.DataDir, o.Log) {
			return errors.New("--read-only changes no file in the data dir: choose --socket, and --log, elsewhere")
		}
	}
	if err := o.checkPush(); err != nil {
		return err
	}
	if o.Disk != 0 && o.Disk < MinDisk {
		return fmt.Errorf("--disk %s is less than %s, the smallest store", o.Disk, MinDisk)
	}
	if o.Retention < MinRetention || o.Retention > maxRetention {
		return fmt.Errorf("--retention %s is not between %s and %s", model.Duration(o.Retention), model.Duration(MinRetention), model.Duration(maxRetention))
	}
	if o.SpansPerSecond < 0 || o.SpansPerSecond > maxRate {
		return fmt.Errorf("--spans-per-second %d is not between 0 and %d", o.SpansPerSecond, maxRate)
	}
	if o.LinesPerSecond < 1 || o.LinesPerSecond > maxRate {
		return fmt.Errorf("--lines-per-second %d is not between 1 and %d", o.LinesPerSecond, maxRate)
	}
	// A node's name is a DNS subdomain (https://kubernetes.io/docs/concepts/overview/working-with-objects/names/).
	if len(o.NodeName) > 253 || strings.ContainsFunc(o.NodeName, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	}) {
		return fmt.Errorf("--node-name %q is not the name of a node", o.NodeName)
	}
	return nil
}

// minBuffer is the smallest buffer: a few files, so that the oldest can be dropped.
const minBuffer Size = 8 << 20

// checkPush checks the settings of a program that only sends.
func (o *Options) checkPush() error {
	if o.PushTo == "" {
		if o.PushCA != "" || o.PushCert != "" || o.PushKey != "" {
			return errors.New("--push-ca, --push-cert and --push-key go with --push-to")
		}
		return nil
	}
	if u, err := url.Parse(o.PushTo); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("--push-to %q is not an https URL", o.PushTo)
	}
	if o.PushCA == "" || o.PushCert == "" || o.PushKey == "" || o.NodeName == "" {
		return errors.New("--push-to needs --push-ca, --push-cert, --push-key and --node-name")
	}
	for flag, given := range map[string]bool{
		"cluster-sockets": o.ClusterSockets != "", "kubeconfig": o.Kubeconfig != "", "remote-write": o.RemoteWrite, "server-socket": o.ServerSocket != "",
		"kubelet-ca": o.KubeletCA != "", "read-only": o.ReadOnly, "disk": o.Disk != 0,
	} {
		if given {
			return fmt.Errorf("--push-to stores nothing, so it does not go with --%s", flag)
		}
	}
	if o.Buffer < minBuffer {
		return fmt.Errorf("--buffer %s is less than %s", o.Buffer, minBuffer)
	}
	return nil
}

func within(dir, path string) bool { return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") }

// LongestSocket is the longest name in the folder of ClusterSockets.
const LongestSocket = "jaeger-thrift.sock"

// maxLogFiles bounds how many files are watched.
const maxLogFiles = 32

func parseLogFile(text string) (LogFile, error) {
	name, path, ok := strings.Cut(text, "=")
	if !ok || name == "" || !filepath.IsAbs(path) {
		return LogFile{}, fmt.Errorf("--log-file %q is not NAME=PATH, with an absolute path", text)
	}
	if len(name) > 63 || strings.ContainsFunc(name, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' }) {
		return LogFile{}, fmt.Errorf("--log-file %q: a name has small letters, digits and -", text)
	}
	return LogFile{Name: name, Path: filepath.Clean(path)}, nil
}
