package command

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
)

func newDatastore() *cobra.Command {
	cmd := &cobra.Command{Use: "datastore", Short: "Move the cluster's state to another datastore"}
	cmd.AddCommand(datastoreMove())
	return cmd
}

func datastoreMove() *cobra.Command {
	var to, output string
	var yes bool
	cmd := &cobra.Command{
		Use:   "move --to sqlite",
		Short: "Move the cluster's state from etcd on this server to SQLite",
		Long: `Move the cluster's state from etcd on this server to SQLite. The server has to be stopped, and to be the only one.

A snapshot is saved first, and the data of etcd are put aside. Revisions continue above the old ones, so that clients only list their objects
again. Afterwards start the server without --cluster-init: that moves the state to etcd.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&to, "to", "", "the datastore: sqlite")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	_ = cmd.MarkFlagRequired("to")
	_ = cmd.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{"sqlite"}, cobra.ShellCompDirectiveNoFileComp))
	outputFlag(cmd, &output)
	return snapshotCommand(cmd, func(cmd *cobra.Command, _ []string, s *snapshot.Snapshots, cfg *config.Server) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		switch {
		case to == "etcd":
			return fmt.Errorf("a server moves from SQLite to etcd by itself: start it with --cluster-init")
		case to != "sqlite":
			return fmt.Errorf("--to %q is not sqlite", to)
		case cfg.ClusterInit:
			return fmt.Errorf("cluster-init is set in %s or in the environment, so the next start would move the state to etcd again: remove it first", cfg.ConfigFile)
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "This moves the cluster's state in %s from etcd to SQLite. The data of etcd are put aside.\n", cfg.DataDir)
		if err := confirm(cmd, yes); err != nil {
			return err
		}
		return replaceDatastore(cmd.OutOrStdout(), output, "move the datastore to SQLite", func() (*snapshot.Restored, error) { return s.MoveToSQLite(cmd.Context()) },
			"The cluster's state is in SQLite now, at revision %d.", fmt.Sprintf("Next: start the server without --cluster-init, for example with `systemctl start %s`.", layout.Unit))
	})
}

// replaceDatastore replaces the datastore in place, and prints what was done, and what is next.
func replaceDatastore(out io.Writer, output, step string, replace func() (*snapshot.Restored, error), done, next string) error {
	if output != "" {
		r, err := replace()
		if err != nil {
			return err
		}
		_, err = printAs(out, output, r)
		return err
	}
	var r *snapshot.Restored
	err := progress.New(out).Do(step, func(*progress.Step) (note string, err error) {
		r, err = replace()
		return "", err
	})
	if err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Fprintln(out, progress.Line(fmt.Sprintf(format, args...))) }
	say(done, r.Next)
	say("What was there before: %s", r.Aside)
	say("A snapshot of it: %s", r.Saved.Path)
	if r.SaveError != "" {
		say("%s", r.SaveError)
	}
	sayOthers(say, r)
	say("%s", next)
	return nil
}

// orAnyway adds, to an error because other servers run, the flag with which that is no error.
func orAnyway(err error, flag string) error {
	if running := new(etcd.RunningError); errors.As(err, &running) {
		return fmt.Errorf("%w. %s does it anyway", err, flag)
	}
	return err
}

// clusterReset is `polymesh server --cluster-reset`.
func clusterReset(cmd *cobra.Command, cfg *config.Server) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s --cluster-reset needs root: run it with sudo", cmd.CommandPath())
	}
	s, err := snapshotsWith(cmd.Context(), cfg)
	if err != nil {
		return err
	}
	if cfg.ClusterResetForce {
		s = s.Anyway()
	}
	if cfg.ClusterResetRestorePath == "" {
		return replaceDatastore(cmd.OutOrStdout(), "", "reset the cluster to this server", func() (*snapshot.Restored, error) {
			r, err := s.Reset(cmd.Context())
			return r, orAnyway(err, "--cluster-reset-force")
		},
			"This server is the only member of etcd now. It continues at revision %d.", "Next: start the server without --cluster-reset.")
	}
	var r *snapshot.Restored
	err = progress.New(cmd.OutOrStdout()).Do("restore a snapshot", func(*progress.Step) (note string, err error) {
		r, err = s.ResetTo(cmd.Context(), cfg.ClusterResetRestorePath)
		return "", orAnyway(err, "--cluster-reset-force")
	})
	if r != nil {
		printRestored(cmd.OutOrStdout(), r, cfg, "Next: start the server without --cluster-reset and --cluster-reset-restore-path.")
	}
	return err
}
