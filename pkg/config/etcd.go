package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// EtcdArgs are settings of etcd on a server, by etcd's names of them. 0 is the default.
type EtcdArgs struct {
	// Quota is the size of the database above which writes fail, in bytes.
	Quota int64
	// Heartbeat and Election are the timing of members, in milliseconds (https://etcd.io/docs/v3.6/tuning/#time-parameters).
	Heartbeat, Election uint
	// SnapshotCount is after how many writes etcd shortens its log.
	SnapshotCount uint64
}

// etcdArg is a setting with its bounds.
type etcdArg struct {
	name        string
	least, most uint64
	set         func(*EtcdArgs, uint64)
}

func etcdArgs() []etcdArg {
	return []etcdArg{
		// The most is what etcd recommends (https://etcd.io/docs/v3.6/dev-guide/limit/).
		{"quota-backend-bytes", 64 << 20, 8 << 30, func(a *EtcdArgs, v uint64) { a.Quota = int64(v) }},
		{"heartbeat-interval", 10, 10_000, func(a *EtcdArgs, v uint64) { a.Heartbeat = uint(v) }},
		// The most is etcd's own (maxElectionMs in its embed/config.go).
		{"election-timeout", 50, 50_000, func(a *EtcdArgs, v uint64) { a.Election = uint(v) }},
		{"snapshot-count", 1000, 1_000_000, func(a *EtcdArgs, v uint64) { a.SnapshotCount = v }},
	}
}

// EtcdArgNames returns the names of the settings for --etcd-arg.
func EtcdArgNames() (names []string) {
	for _, a := range etcdArgs() {
		names = append(names, a.name)
	}
	return names
}

func parseEtcdArgs(texts []string) (args EtcdArgs, err error) {
	known := etcdArgs()
	for _, text := range texts {
		name, value, ok := strings.Cut(strings.TrimPrefix(text, "--"), "=")
		i := slices.IndexFunc(known, func(a etcdArg) bool { return a.name == name })
		if !ok || i < 0 {
			return args, fmt.Errorf("--etcd-arg %q is not name=value with one of the names %s: Polymesh sets the others itself", text, strings.Join(EtcdArgNames(), ", "))
		}
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil || n < known[i].least || n > known[i].most {
			return args, fmt.Errorf("--etcd-arg %s=%q is not a whole number from %d to %d", name, value, known[i].least, known[i].most)
		}
		known[i].set(&args, n)
	}
	if (args.Heartbeat == 0) != (args.Election == 0) {
		return args, fmt.Errorf("--etcd-arg heartbeat-interval and election-timeout belong together: set both, on all servers")
	}
	if 5*args.Heartbeat > args.Election {
		return args, fmt.Errorf("--etcd-arg election-timeout=%d is less than five times heartbeat-interval=%d", args.Election, args.Heartbeat)
	}
	return args, nil
}
