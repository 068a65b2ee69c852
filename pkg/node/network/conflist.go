package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
)

// Conflist renders the CNI configuration: a bridge whose pods get addresses of the range and can publish ports
// (https://www.cni.dev/plugins/current/main/bridge/). mtu is that of the pods' interfaces, in bytes. Their traffic that leaves the cluster uses
// the node's address, see masquerade; between pods no address is translated, so ipMasq is off.
func Conflist(name, podCIDR, stateDir string, mtu int, nftables bool) ([]byte, error) {
	backend := "nftables"
	if !nftables {
		backend = "iptables"
	}
	conf := map[string]any{
		"cniVersion": "1.0.0",
		"name":       name,
		"plugins": []map[string]any{
			{
				"type":             "bridge",
				"bridge":           layout.Bridge,
				"isDefaultGateway": true,
				"forceAddress":     true,
				"hairpinMode":      true,
				"ipMasq":           false,
				"mtu":              mtu,
				"ipam": map[string]any{
					"type":    "host-local",
					"dataDir": stateDir,
					"ranges":  [][]map[string]string{{{"subnet": podCIDR}}},
				},
			},
			{
				"type":         portmap,
				"backend":      backend,
				"snat":         true,
				"capabilities": map[string]bool{portMappings: true},
			},
		},
	}
	text, err := json.MarshalIndent(conf, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

// configuration is the file from which containerd takes the pod network. Until it exists no pod starts; running pods keep what they were
// started with, which libcni has recorded.
type configuration struct {
	dir string
	// text returns the content; nil until it is known.
	text func() ([]byte, error)
	// none is set if another program provides the pod network: our file is removed.
	none bool

	mu      sync.Mutex
	settled []byte
}

func (c *configuration) path() string { return filepath.Join(c.dir, "10-polymesh.conflist") }

// Settle implements keeper.Changing.
func (c *configuration) Settle(context.Context) error {
	if c.none {
		if err := os.Remove(c.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the CNI configuration: %w", err)
		}
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	text, err := c.text()
	if err != nil || text == nil || bytes.Equal(text, c.settled) {
		return err
	}
	if have, err := os.ReadFile(c.path()); err != nil || !bytes.Equal(have, text) {
		if err := atomicfile.Write(c.path(), text, 0o644); err != nil {
			return fmt.Errorf("write the CNI configuration: %w", err)
		}
	}
	c.settled = text
	return nil
}

// Missing implements keeper.Part.
func (c *configuration) Missing(context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.settled == nil {
		return "", nil
	}
	have, err := os.ReadFile(c.path())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("check the CNI configuration: %w", err)
	}
	if bytes.Equal(have, c.settled) {
		return "", nil
	}
	return "the CNI configuration " + c.path(), nil
}

// Restore implements keeper.Part.
func (c *configuration) Restore(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return atomicfile.Write(c.path(), c.settled, 0o644)
}
