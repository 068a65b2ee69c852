// The program is `polymesh agent` alone, for the tests of a node with an older Kubernetes: build/test.mk builds it with the kubelet and the
// kube-proxy of the minor version before. What the other commands link does not build with these.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"polymesh.dev/polymesh/pkg/agent"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/node"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == node.ProxyCommand {
		os.Exit(node.RunProxy(os.Args[2:]))
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "polymesh:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || args[0] != "agent" {
		return fmt.Errorf("there is no command %q: this program is for tests, and has only agent", args)
	}
	cfg, err := config.ParseAgent(args[1:], os.Environ())
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return agent.Run(ctx, cfg)
}
