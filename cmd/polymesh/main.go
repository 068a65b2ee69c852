// The program: every command of `polymesh`, and kubectl and istioctl. The launcher (cmd/launcher) unpacks and runs it.
package main

import (
	"os"

	"polymesh.dev/polymesh/pkg/command"
)

func main() { os.Exit(command.Run(os.Args)) }
