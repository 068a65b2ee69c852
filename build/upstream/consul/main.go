// Command consul is a Consul agent and nothing else of Consul: `consul -dev …` is `consul agent -dev …`. The tests of
// `polymesh bridge` run it; it does not ship. Its other commands would be compiled for nobody.
//
// It is of the last releases under the Mozilla Public License: 1.14.12, 1.15.8, 1.16.4, 1.17 and what follows are under the
// Business Source License, which their LICENSE files say. 1.15 and 1.16 need a module that the Go module proxy does not have.
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
