package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

func newSecretsEncrypt() *cobra.Command {
	var dataDir layout.DataDir
	cmd := &cobra.Command{
		Use:   "secrets-encrypt",
		Short: "Encrypt Secrets in the datastore, and change the key",
		Long: `Encrypt Secrets in the datastore, and change the key. The servers keep running, and need no restart. A snapshot
(polymesh snapshot) is saved before each change.

With several servers, run it on one of them: the others get the keys from it, and all of them must run. A change that was interrupted
is continued by "reencrypt", on any server.

Starting a server with --secrets-encryption has the same effect as "enable". Data written before stays in old revisions until
they are compacted, and in free parts of the datastore's file.`,
	}
	// cluster returns the running server of the data dir.
	cluster := func(cmd *cobra.Command) (encryption.Cluster, error) {
		if os.Geteuid() != 0 {
			return encryption.Cluster{}, errors.New("secrets-encrypt needs root: run it with sudo")
		}
		if _, err := status.Ask(cmd.Context(), dataDir.StatusSocket()); errors.Is(err, status.ErrNotRunning) {
			fmt.Fprintf(cmd.ErrOrStderr(), "polymesh: no server is running on %s: start one with `polymesh server`\n", dataDir)
			return encryption.Cluster{}, exitError(3)
		} else if err != nil {
			return encryption.Cluster{}, err
		}
		endpoint, err := datastore.ReadEndpoint(dataDir.DatastoreEndpoint())
		if err != nil {
			return encryption.Cluster{}, err
		}
		return encryption.Cluster{
			Place:      encryption.Place{File: dataDir.EncryptionFile(), Datastore: endpoint, BootstrapKey: dataDir.BootstrapKey()},
			Kubeconfig: dataDir.Kubeconfig("polymesh"),
		}, nil
	}
	change := func(use, short, title string, provider *string, run func(encryption.Cluster, *cobra.Command) error) *cobra.Command {
		skip := false
		sub := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			if provider != nil && *provider != "" && !slices.Contains(config.EncryptionProviders(), *provider) {
				return fmt.Errorf("--provider %q is not one of %s", *provider, strings.Join(config.EncryptionProviders(), ", "))
			}
			c, err := cluster(cmd)
			if err != nil {
				return err
			}
			if !skip {
				if c.Before, err = snapshotBefore(cmd, dataDir); err != nil {
					return err
				}
			}
			return progress.New(cmd.OutOrStdout()).Do(title, func(step *progress.Step) (string, error) {
				c.Progress = func(done, total int) { step.Note("%d of %d Secrets", done, total) }
				c.Waiting = func(why string) { step.Note("%s", why) }
				return "", run(c, cmd)
			})
		}}
		dataDirFlag(sub, &dataDir)
		sub.Flags().BoolVar(&skip, "skip-snapshot", false, "do not save a snapshot first")
		return sub
	}
	providerFlag := func(sub *cobra.Command, provider *string, value, text string) *cobra.Command {
		sub.Flags().StringVar(provider, "provider", value, text+strings.Join(config.EncryptionProviders(), ", "))
		_ = sub.RegisterFlagCompletionFunc("provider", cobra.FixedCompletions(config.EncryptionProviders(), cobra.ShellCompDirectiveNoFileComp))
		return sub
	}

	var first, next, output string
	report := &cobra.Command{Use: "status", Short: "Show the keys, and how many Secrets use each", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		c, err := cluster(cmd)
		if err != nil {
			return err
		}
		s, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if done, err := printAs(cmd.OutOrStdout(), output, s); done {
			return err
		}
		return printEncryption(cmd.OutOrStdout(), s)
	}}
	outputFlag(report, &output)
	dataDirFlag(report, &dataDir)
	cmd.AddCommand(
		report,
		providerFlag(change("enable", "Encrypt Secrets, including existing ones", "encrypt Secrets", &first, func(c encryption.Cluster, cmd *cobra.Command) error {
			return c.Enable(cmd.Context(), first)
		}), &first, config.EncryptionProviders()[0], "how: "),
		change("disable", "Decrypt Secrets, including existing ones", "decrypt Secrets", nil, func(c encryption.Cluster, cmd *cobra.Command) error {
			return c.Disable(cmd.Context())
		}),
		providerFlag(change("rotate-keys", "Encrypt all Secrets with a new key, and remove the old one", "encrypt Secrets with a new key", &next, func(c encryption.Cluster, cmd *cobra.Command) error {
			return c.Rotate(cmd.Context(), next)
		}), &next, "", "how (default: as now): "),
		change("reencrypt", "Continue an interrupted change", "rewrite Secrets", nil, func(c encryption.Cluster, cmd *cobra.Command) error {
			return c.Finish(cmd.Context())
		}),
	)
	return cmd
}

func printEncryption(w io.Writer, s *encryption.Status) error {
	state := "disabled"
	if s.Enabled {
		state = "enabled"
	}
	fmt.Fprintf(w, "encryption: %s\nSecrets that are not encrypted: %d\n", state, s.Plain)
	if s.Unfinished {
		fmt.Fprintln(w, "a change runs, or was interrupted: continue it with `polymesh secrets-encrypt reencrypt`")
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	if len(s.Keys) > 0 {
		fmt.Fprintln(t, "\nACTIVE\tPROVIDER\tKEY\tSECRETS")
	}
	for _, k := range s.Keys {
		active := ""
		switch {
		case k.Active:
			active = "*"
		case k.Next:
			active = "next"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\n", active, k.Provider, k.Name, k.Secrets)
	}
	if len(s.Servers) > 0 {
		fmt.Fprintln(t, "\nSERVER\tKEYS\tCONFIGURATION")
	}
	for _, server := range s.Servers {
		hash := "-"
		if server.Hash != "" {
			hash = progress.Line(fmt.Sprintf("%.19s", server.Hash)) // as short as docker's
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", progress.Line(server.Name), server.State, hash)
	}
	return t.Flush()
}
