package command

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/reset"
)

func newReset() *cobra.Command {
	var opts reset.Options
	var yes bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Stop and remove everything that a server or agent created on this machine",
		Long: `Stop and remove everything that a server or agent created on this machine: processes, mounts, network interfaces, packet
filter rules, cgroups and data. Volumes, the datastore, snapshots in the data dir, and recorded metrics, logs and traces are lost;
--keep-observe keeps the last three. It lists what will be removed and what will stay before it asks, and can be run again after an
interruption. An agent, and a server that is one of several, leaves its cluster first.

A data dir is recognized by the file polymesh.json, which a server writes at its first start. A folder without it, a kubeconfig
of another cluster, and what other servers use is not removed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("reset needs root: run it with sudo")
			}
			plan, err := reset.Look(cmd.Context(), opts)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if len(plan.Remove) == 0 {
				why := "does not exist"
				if _, err := os.Stat(string(plan.DataDir)); err == nil {
					why = "contains nothing that goes"
				}
				_, err := fmt.Fprintf(out, "%s %s: nothing was removed\n", plan.DataDir, why)
				return err
			}
			listPlan(out, plan, lost(plan))
			if err := confirm(cmd, yes); err != nil {
				return err
			}
			return plan.Run(cmd.Context(), out)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&opts.Force, "force", false, "remove an agent, or a server of several, also if it cannot leave its cluster; its node stays there")
	cmd.Flags().BoolVar(&opts.KeepObserve, "keep-observe", false, "keep the metrics, logs and traces that were recorded, in the folder observe of the data dir")
	cmd.Flags().StringVar(&opts.Kubeconfig, "kubeconfig", layout.DefaultKubeconfig, "a kubeconfig that is also removed if it is only for this cluster; the one that the server wrote last is always checked")
	dataDirFlag(cmd, &opts.DataDir)
	return cmd
}

// lost is what a user loses with a reset.
func lost(plan *reset.Plan) string {
	if plan.Agent {
		return "This stops all pods of this node. Their volumes in the data dir are lost. "
	}
	return "This stops all pods. All volumes, the datastore, and snapshots in the data dir are lost. "
}

// listPlan prints first, then what will be removed and what will stay.
func listPlan(out io.Writer, plan *reset.Plan, first string) {
	fmt.Fprintln(out, first+"These will be removed:")
	for _, line := range plan.Remove {
		fmt.Fprintln(out, "  "+line)
	}
	if len(plan.Leave) > 0 {
		fmt.Fprintln(out, "These stay:")
		for _, line := range plan.Leave {
			fmt.Fprintln(out, "  "+line)
		}
	}
}

// confirm asks whether to continue. The error reports that nothing was changed.
func confirm(cmd *cobra.Command, yes bool) error {
	if yes {
		return nil
	}
	ok, err := ask(cmd.InOrStdin(), cmd.OutOrStdout(), "Continue? [y/N] ")
	if err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	if !ok {
		return errors.New("nothing was changed")
	}
	return nil
}

// ask reads an answer; anything but yes means no.
func ask(in io.Reader, out io.Writer, question string) (bool, error) {
	fmt.Fprint(out, question)
	line, err := bufio.NewReader(in).ReadString('\n')
	if errors.Is(err, io.EOF) {
		fmt.Fprintln(out)
		return false, errors.New("no answer: use --yes if there is no terminal")
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", err
}
