package command

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"polymesh.dev/polymesh/pkg/controlplane/member"
	"polymesh.dev/polymesh/pkg/controlplane/overview"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

func newNode() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "List the cluster's nodes, and remove one",
	}
	cmd.AddCommand(newNodeList(), newNodeRemove())
	return cmd
}

func newNodeList() *cobra.Command {
	var output string
	flags := apiFlags()
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the nodes: role, since when they are Ready, version, address",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			nodes, err := clusterNodes(cmd, flags)
			if err != nil {
				return err
			}
			if done, err := printAs(cmd.OutOrStdout(), output, nodes); done {
				return err
			}
			return printNodes(cmd.OutOrStdout(), nodes, time.Now())
		},
	}
	outputFlag(cmd, &output)
	flags.AddFlags(cmd.Flags())
	return cmd
}

func clusterNodes(cmd *cobra.Command, flags *genericclioptions.ConfigFlags) ([]status.Node, error) {
	client, _, err := apiClient(cmd.Context(), flags)
	if err != nil {
		return nil, err
	}
	version, err := client.Discovery().ServerVersion()
	if err != nil {
		return nil, err
	}
	list, err := client.CoreV1().Nodes().List(cmd.Context(), metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the nodes: %w", err)
	}
	return overview.Nodes(list.Items, version.GitVersion), nil
}

func newNodeRemove() *cobra.Command {
	var force bool
	var dataDir layout.DataDir
	flags := apiFlags()
	cmd := &cobra.Command{
		Use:     "remove NAME",
		Aliases: []string{"rm", "delete"},
		Short:   "Remove a node from the cluster, and the member of etcd of a server",
		Long: `Remove a node from the cluster, and the member of etcd of a server. It is for a machine that does not run any more: on one that does,
polymesh reset removes its node too, and first:

  polymesh kubectl drain NAME --ignore-daemonsets --delete-emptydir-data

A server is not removed if it is the only one, or if the others would not be a majority that answers. To remove a server, run this on
another one.`,
		Args:              oneArg("the name of a node, as `polymesh node list` shows it"),
		ValidArgsFunction: completeNodes(flags),
		RunE: func(cmd *cobra.Command, args []string) error {
			local := member.Local{Socket: dataDir.StatusSocket()}
			// With a kubeconfig, server or context of the user's it may be another cluster's node.
			here := !slices.ContainsFunc([]string{"kubeconfig", "server", "context"}, cmd.Flags().Changed)
			if err := local.Works(cmd.Context()); err != nil && here {
				return fmt.Errorf("node %s stays: %w", progress.Line(args[0]), err)
			}
			client, _, err := apiClient(cmd.Context(), flags)
			if err != nil {
				return err
			}
			removal := member.Removal{
				Client: client, Local: local, Force: force,
				Done: func(what string) { fmt.Fprintln(cmd.OutOrStdout(), "✓ "+progress.Line(what)) },
			}
			// Without one, this machine may still be the administrator's.
			if report, err := status.Ask(cmd.Context(), dataDir.StatusSocket()); err == nil {
				removal.Self = report.Node
			}
			return removal.Run(cmd.Context(), args[0])
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if the node is Ready")
	flags.AddFlags(cmd.Flags())
	dataDirFlag(cmd, &dataDir)
	return cmd
}

// completeNodes completes the name of a node.
func completeNodes(flags *genericclioptions.ConfigFlags) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		nodes, err := clusterNodes(cmd, flags)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for _, n := range nodes {
			names = append(names, n.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func printNodes(w io.Writer, nodes []status.Node, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NODE\tROLE\tSTATUS\tSINCE\tVERSION\tADDRESS\tMESSAGE")
	for _, n := range nodes {
		state := "Ready"
		if !n.Ready {
			state = "NotReady"
		}
		if n.Unschedulable {
			state += ",SchedulingDisabled"
		}
		since := "-"
		if !n.Since.IsZero() {
			since = duration.HumanDuration(now.Sub(n.Since))
		}
		version := n.Version
		if n.Skew != "" {
			version += " (" + n.Skew + ")"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", progress.Line(n.Name), n.Role, state, since, progress.Line(version), progress.Line(orDash(n.Address)), progress.Line(n.Reason))
	}
	return t.Flush()
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func newEtcd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "etcd",
		Short: "List the members of etcd on the servers, and remove one",
	}
	cmd.AddCommand(newEtcdMembers(), newEtcdRemove())
	return cmd
}

// localMembers returns the members of etcd as this machine's server knows them.
func localMembers(cmd *cobra.Command, dataDir layout.DataDir) ([]status.Member, error) {
	members, self, err := member.Local{Socket: dataDir.StatusSocket()}.Members(cmd.Context())
	if errors.Is(err, status.ErrNotRunning) {
		return nil, notRunning(cmd, dataDir)
	}
	if err != nil {
		return nil, err
	}
	var list []status.Member
	for _, m := range members {
		list = append(list, overview.Member(m, self))
	}
	return list, nil
}

// notRunning prints that this machine runs no server.
func notRunning(cmd *cobra.Command, dataDir layout.DataDir) error {
	fmt.Fprintf(cmd.ErrOrStderr(), "polymesh: no server is running on %s: run it on a server\n", dataDir)
	return exitError(3)
}

func newEtcdMembers() *cobra.Command {
	var output string
	var dataDir layout.DataDir
	cmd := &cobra.Command{
		Use:     "members",
		Aliases: []string{"member-list", "list", "ls"},
		Short:   "List the members, as the server of this machine knows them, and whether they answer",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			members, err := localMembers(cmd, dataDir)
			if err != nil {
				return err
			}
			if done, err := printAs(cmd.OutOrStdout(), output, members); done {
				return err
			}
			return printMembers(cmd.OutOrStdout(), members)
		},
	}
	outputFlag(cmd, &output)
	dataDirFlag(cmd, &dataDir)
	return cmd
}

func newEtcdRemove() *cobra.Command {
	var dataDir layout.DataDir
	cmd := &cobra.Command{
		Use:     "remove NODE|ID",
		Aliases: []string{"member-remove", "rm", "delete"},
		Short:   "Remove a member whose node does not exist any more",
		Long: `Remove a member whose node does not exist any more. It is given by the name of its node, by its own name, or by its ID.
polymesh node remove removes a node with its member.

A member is not removed if it is the only one, or if the others would not be a majority that answers.`,
		Args: oneArg("the name of a node, or a member's ID, as `polymesh etcd members` shows them"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			members, _ := localMembers(cmd, dataDir)
			var names []string
			for _, m := range members {
				names = append(names, cmp.Or(m.Node, m.ID))
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := member.Local{Socket: dataDir.StatusSocket()}.RemoveNamed(cmd.Context(), args[0], dataDir.Kubeconfig("polymesh"))
			if errors.Is(err, status.ErrNotRunning) {
				return notRunning(cmd, dataDir)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "✓ member %x of etcd, of node %s, removed\n", m.ID, progress.Line(orDash(m.Node())))
			return err
		},
	}
	dataDirFlag(cmd, &dataDir)
	return cmd
}

func printMembers(w io.Writer, members []status.Member) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "MEMBER\tNODE\tROLE\tADDRESS\tVERSION\tMESSAGE")
	for _, m := range members {
		role := "voter"
		switch {
		case m.Learner:
			role = "learner"
		case m.Leader:
			role = "leader"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", m.ID, progress.Line(orDash(m.Node)), role, progress.Line(m.URL), orDash(m.Version), progress.Line(m.Problem))
	}
	return t.Flush()
}
