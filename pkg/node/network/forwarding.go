package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// kernelSettings enable packet forwarding, also between pods on one bridge, where replies must pass the rules
// that translated the request.
type kernelSettings map[string]string

func forwarding() kernelSettings {
	return kernelSettings{
		"/proc/sys/net/ipv4/ip_forward":                 "1",
		"/proc/sys/net/bridge/bridge-nf-call-iptables":  "1",
		"/proc/sys/net/bridge/bridge-nf-call-ip6tables": "1",
	}
}

// Missing implements keeper.Part.
func (s kernelSettings) Missing(context.Context) (string, error) {
	var off []string
	for path, value := range s {
		have, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("check packet forwarding: %w", err)
		}
		if strings.TrimSpace(string(have)) != value {
			off = append(off, filepath.Base(path)+"="+value)
		}
	}
	if len(off) == 0 {
		return "", nil
	}
	return "packet forwarding (" + strings.Join(off, ", ") + ")", nil
}

// Restore implements keeper.Part.
func (s kernelSettings) Restore(context.Context) error {
	for path, value := range s {
		if have, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) == value {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			return fmt.Errorf("turn packet forwarding on: %w", err)
		}
	}
	return nil
}
