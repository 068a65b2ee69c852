package command

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/reset"
)

func newReset() *cobra.Command {
	var opts reset.Options
	var yes bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Stop and remove everything that a server made on this machine",
		Long: `Stop and remove everything that a server made on this machine: processes, mounts, network interfaces, packet
filter rules, cgroups and data. Volumes and the datastore are lost. It can be run again when it was cut off.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("reset needs root: run it with sudo")
			}
			if !yes {
				ok, err := ask(cmd.InOrStdin(), cmd.OutOrStdout(), fmt.Sprintf("This stops all pods and deletes %s with all volumes. Go on? [y/N] ", opts.DataDir))
				if err != nil {
					return fmt.Errorf("nothing was changed: %w", err)
				}
				if !ok {
					return errors.New("nothing was changed")
				}
			}
			opts.Out = cmd.OutOrStdout()
			return reset.Run(cmd.Context(), opts)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().StringVar(&opts.Kubeconfig, "kubeconfig", config.DefaultKubeconfig, "the kubeconfig that the server wrote, removed too")
	dataDirFlag(cmd, &opts.DataDir)
	return cmd
}

// ask reads an answer; anything but yes is no.
func ask(in io.Reader, out io.Writer, question string) (bool, error) {
	fmt.Fprint(out, question)
	line, err := bufio.NewReader(in).ReadString('\n')
	if errors.Is(err, io.EOF) {
		fmt.Fprintln(out)
		return false, errors.New("no answer: use --yes where nobody can answer")
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", err
}
