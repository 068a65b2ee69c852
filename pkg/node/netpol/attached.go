package netpol

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// recordDir is where libcni keeps a record of each pod that it has attached to a network (CacheDir in
// github.com/containernetworking/cni/libcni). It writes the record before the pod's first container is created; the pod's status has
// the address a second later or more. So with the records a pod's rules exist before it can send a packet.
const recordDir = "/var/lib/cni/results"

// attachment is one pod of this node on the pod network.
type attachment struct {
	namespace, name, uid string
	addresses            []netip.Addr
}

// record is the part of libcni's file that is read here (cachedInfo in libcni/api.go).
type record struct {
	NetworkName string          `json:"networkName"`
	NetNS       string          `json:"netns"`
	Args        [][2]string     `json:"cniArgs"`
	Result      json.RawMessage `json:"result"`
}

// attachments reads the records of a network's running pods. Records survive a reboot, the network namespaces in them do not. One that
// is being written is left out: its completion is another event.
func attachments(dir, network string) ([]attachment, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the pods' networks: %w", err)
	}
	var out []attachment
	for _, file := range files {
		text, err := os.ReadFile(filepath.Join(dir, file.Name()))
		if err != nil {
			continue
		}
		var r record
		if json.Unmarshal(text, &r) != nil || r.NetworkName != network {
			continue
		}
		if _, err := os.Stat(r.NetNS); err != nil {
			continue
		}
		result, err := create.CreateFromBytes(r.Result)
		if err != nil {
			continue
		}
		typed, err := current.GetResult(result)
		if err != nil {
			continue
		}
		a := attachment{}
		// As containerd sets them (internal/cri/server/sandbox_run.go, cniNamespaceOpts).
		for _, arg := range r.Args {
			switch arg[0] {
			case "K8S_POD_NAMESPACE":
				a.namespace = arg[1]
			case "K8S_POD_NAME":
				a.name = arg[1]
			case "K8S_POD_UID":
				a.uid = arg[1]
			}
		}
		for _, ip := range typed.IPs {
			if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok && addr.Unmap().Is4() {
				a.addresses = append(a.addresses, addr.Unmap())
			}
		}
		if len(a.addresses) > 0 {
			out = append(out, a)
		}
	}
	return out, nil
}
