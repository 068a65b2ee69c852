package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

func newStatus() *cobra.Command {
	var output string
	var cluster bool
	var dataDir layout.DataDir
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show each component of the running server or agent, and the cluster: state, since when, version, memory",
		Long: `Show each component of the running server or agent: state, since when, version, memory.

On a server of a cluster with several nodes it also shows the cluster, as this server sees it: nodes, members of etcd, leaders,
certificates, the last snapshot. On an agent it shows the API servers, and to which one it is connected.

On a server it also names the first workloads and namespaces that have problems, and why.

The exit code is 0 if all components of this node are ready, 1 if one is not, 3 if no node is running.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
			defer cancel()
			scope := status.Automatic
			if cluster {
				scope = status.WithCluster
			}
			report, err := status.AskFor(ctx, dataDir.StatusSocket(), scope)
			if errors.Is(err, status.ErrNotRunning) {
				fmt.Fprintf(cmd.ErrOrStderr(), "polymesh: no node is running on %s: start it with `polymesh server` or `polymesh agent`\n", dataDir)
				return exitError(3)
			}
			if err != nil {
				return err
			}
			done, err := printAs(cmd.OutOrStdout(), output, report)
			if !done {
				err = printReport(cmd.OutOrStdout(), report, time.Now())
			}
			if err != nil {
				return err
			}
			if !report.Ready {
				return exitError(1)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&cluster, "cluster", false, "show the cluster also if it has one node")
	outputFlag(cmd, &output)
	dataDirFlag(cmd, &dataDir)
	return cmd
}

func dataDirFlag(cmd *cobra.Command, dataDir *layout.DataDir) {
	*dataDir = dataDirFromEnv()
	cmd.Flags().VarP((*folder)(dataDir), "data-dir", "d", "the node's data folder")
}

// folder is the value of a flag for a data dir.
type folder layout.DataDir

func (f *folder) String() string { return string(*f) }
func (f *folder) Type() string   { return "string" }
func (f *folder) Set(value string) error {
	dir, err := layout.ParseDataDir(value)
	if err == nil {
		*f = folder(dir)
	}
	return err
}

func printReport(w io.Writer, r *status.Report, now time.Time) error {
	fmt.Fprintf(w, "polymesh %s on node %s (%s), process %d, up %s, %s of memory (%s anonymous)\n\n",
		r.Version, r.Node, r.NodeIP, r.PID, duration.HumanDuration(now.Sub(r.Since)), mib(r.Memory), mib(r.Anonymous))
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "COMPONENT\tSTATE\tSINCE\tVERSION\tMEMORY\tMESSAGE")
	for _, c := range r.Components {
		memory, version := mib(c.Memory), c.Version
		if c.InServer {
			memory = "in server"
		}
		if version == "" {
			version = "-"
		}
		message, notes := c.Message, c.Notes
		if message == "" && len(notes) > 0 {
			message, notes = notes[0], notes[1:]
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", c.Name, c.State, duration.HumanDuration(now.Sub(c.Since)), version, memory, progress.Line(message))
		for _, note := range notes {
			fmt.Fprintf(t, "\t\t\t\t\t%s\n", progress.Line(note))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(r.Servers) > 0 {
		if err := printServers(w, r.Servers); err != nil {
			return err
		}
	}
	if r.Cluster != nil {
		if err := printCluster(w, r.Cluster, now); err != nil {
			return err
		}
	}
	return printWorkloads(w, r, now)
}

// problemsShown is how many workloads with problems are named.
const problemsShown = 3

// printWorkloads writes what is wrong with the cluster's workloads, and nothing if they are well.
func printWorkloads(w io.Writer, r *status.Report, now time.Time) error {
	if r.Workloads == nil {
		return nil
	}
	if r.Workloads.Unknown != "" {
		// While the server starts, its components say why.
		if r.Ready {
			fmt.Fprintf(w, "\n? whether workloads have problems: %s\n", progress.Line(r.Workloads.Unknown))
		}
		return nil
	}
	n, problems := r.Workloads.Troubled, r.Workloads.Problems
	if n == 0 {
		return nil
	}
	title := counted(n, "workload has problems", "workloads have problems")
	if slices.ContainsFunc(problems, func(p status.Problem) bool { return p.Namespace == "" }) {
		title = counted(n, "workload or namespace has problems", "workloads and namespaces have problems")
	}
	fmt.Fprintf(w, "\n! %s:\n", title)
	for _, p := range problems[:min(problemsShown, len(problems))] {
		text := strings.ToLower(p.Kind) + " "
		if p.Namespace != "" {
			text += p.Namespace + "/"
		}
		text += p.Name + ": "
		if p.Replicas > 0 {
			text += fmt.Sprintf("%d of %s: ", p.Ready, counted(int(p.Replicas), "pod is ready", "pods are ready"))
		}
		if p.Container != "" {
			text += "container " + p.Container + ": "
		}
		text += p.Reason + ": " + p.Message
		if !p.Checked.IsZero() {
			text += fmt.Sprintf(" (not checked again for %s)", duration.HumanDuration(now.Sub(p.Checked)))
		}
		fmt.Fprintf(w, "    %s\n", progress.Line(text))
	}
	if more := n - min(problemsShown, len(problems)); more > 0 {
		fmt.Fprintf(w, "    and %d more\n", more)
	}
	see := "`polymesh kubectl get pods -A`"
	if slices.ContainsFunc(r.Components, func(c status.Component) bool { return c.Name == observed }) {
		see = "`polymesh dashboard`, or " + see
	}
	_, err := fmt.Fprintf(w, "  see %s\n", see)
	return err
}

// observed is the component without which there is no page.
const observed = "observe"

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
