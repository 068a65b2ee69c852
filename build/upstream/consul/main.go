// Command consul is a Consul agent, and nothing else that Consul's own program is: `consul -dev` is `consul agent -dev`. The
// tests of `polymesh bridge` run it; it does not ship.
//
// It is of October 2023, under the MPL. What HashiCorp has released since then is under the Business Source License, the later
// patches of 1.15 and 1.16 too, as their LICENSE files say. It is no 1.16, because that needs a module (envoyextensions v0.4.1)
// that Go's checksum database does not know.
package main

import (
	"os"

	"github.com/hashicorp/consul/command/agent"
	"github.com/hashicorp/consul/command/cli"
	mcli "github.com/mitchellh/cli"
)

func main() {
	ui := &cli.BasicUI{BasicUi: mcli.BasicUi{Writer: os.Stdout, ErrorWriter: os.Stderr}}
	os.Exit(agent.New(ui).Run(os.Args[1:]))
}
