// Package kubeflags merges the flags that Polymesh sets on a Kubernetes component with those of the user. The control
// plane and the node call it for each component that they run.
package kubeflags

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// Merge returns the command line for a component: ours in a fixed order, without those that the user sets, followed by the
// user's ("name=value", "--name=value" or just "name"), which may repeat a flag.
func Merge(ours map[string]string, user []string) []string {
	theirs := make([]string, len(user))
	for i, arg := range user {
		theirs[i] = "--" + strings.TrimPrefix(arg, "--")
	}
	var args []string
	for name, value := range ours {
		if !Sets(user, name) {
			args = append(args, "--"+name+"="+value)
		}
	}
	slices.Sort(args)
	return append(args, theirs...)
}

// Sets reports whether the user sets a flag.
func Sets(user []string, name string) bool {
	return slices.ContainsFunc(user, func(arg string) bool {
		set, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		return set == name
	})
}

// Log logs a component's command line as K3s does, for diagnosis.
func Log(component string, args []string) {
	klog.Infof("Running %s %s", component, strings.Join(args, " "))
}

// Check parses args with the component's own flags; an error names the setting that a bad flag came from.
func Check(setting string, flags *pflag.FlagSet, args []string) error {
	flags.Init(setting, pflag.ContinueOnError)
	flags.Usage = func() {}
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("--%s: %w", setting, err)
	}
	return nil
}
