package command

import (
	"fmt"
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/istioctl"
)

// tools are the upstream programs inside this one, by name. Each takes what follows its name and returns an exit code.
var tools = map[string]func(args []string) int{
	"kubectl":  runKubectl,
	"istioctl": runIstioctl,
}

// runKubectl is kubectl's own main (cmd/kubectl/kubectl.go upstream).
func runKubectl(args []string) int {
	if err := useClusterKubeconfig(); err != nil {
		fmt.Fprintln(os.Stderr, "kubectl:", err)
		return 1
	}
	// kubectl reads its command line from os.Args, in search of plug-ins.
	os.Args = append([]string{"kubectl"}, args...)
	if err := cli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err)
	}
	return 0
}

func runIstioctl(args []string) int {
	if err := useClusterKubeconfig(); err != nil {
		fmt.Fprintln(os.Stderr, "istioctl:", err)
		return 1
	}
	return istioctl.Run(args)
}
