package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

const volumesAreNotInIt = "The data of PersistentVolumes is not in a snapshot: back it up by other means."

const databaseIsNotInIt = "The database is outside of this server, and not in it: back it up with its own tools, too."

func newSnapshot() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "snapshot",
		Aliases: []string{"snapshots", "etcd-snapshot"},
		Short:   "Save the cluster in a file, and restore it",
		Long: `Save the cluster in a file, and restore it on this machine or an empty one.

A snapshot has the datastore, the certificate authorities, the keys of Secrets, tokens, and the config file: users who can read it are
administrators of the cluster, unless it is encrypted. ` + volumesAreNotInIt + `

A server saves one every 12 hours (--snapshot-schedule). These commands read the server's config file and environment, so that they
use the same folder, bucket and passphrase. K3s's names of the flags (--dir, --etcd-s3-bucket) work as well.`,
	}
	cmd.AddCommand(snapshotSave(), snapshotList(), snapshotRestore(), snapshotPrune(), snapshotDelete())
	return cmd
}

// snapshotCommand adds a server's flags for snapshots to a command.
func snapshotCommand(cmd *cobra.Command, run func(cmd *cobra.Command, args []string, s *snapshot.Snapshots, cfg *config.Server) error) *cobra.Command {
	flags := config.SnapshotFlags()
	cmd.Flags().SetNormalizeFunc(config.SnapshotNames)
	cmd.Flags().AddFlagSet(flags.FlagSet)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if os.Geteuid() != 0 {
			return fmt.Errorf("%s needs root: run it with sudo", cmd.CommandPath())
		}
		cfg, s, err := snapshotsOf(cmd.Context(), flags)
		if err != nil {
			return err
		}
		return run(cmd, args, s, cfg)
	}
	return cmd
}

// snapshotsOf returns the configuration of this machine's server, running or not, and its snapshots.
func snapshotsOf(ctx context.Context, flags *config.Flags) (*config.Server, *snapshot.Snapshots, error) {
	cfg, err := flags.Server(os.Environ())
	if err != nil {
		return nil, nil, err
	}
	s, err := snapshotsWith(ctx, cfg)
	return cfg, s, err
}

// snapshotsWith returns the snapshots of a server with this configuration.
func snapshotsWith(ctx context.Context, cfg *config.Server) (*snapshot.Snapshots, error) {
	node := cfg.NodeName
	if report, err := status.Ask(ctx, cfg.DataDir.StatusSocket()); err == nil {
		node = report.Node
	}
	if node == "" {
		node = etcd.NodeOf(cfg.DataDir.Etcd())
	}
	if node == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("read the host's name: %w", err)
		}
		node = strings.ToLower(host)
	}
	store, err := sourceOf(cfg)
	if err != nil {
		return nil, err
	}
	return snapshot.Configured(cfg, node, store)
}

// sourceOf returns the datastore of this machine's server, running or not. The flags of a service are not known here, but the last start has
// written what it used.
func sourceOf(cfg *config.Server) (snapshot.Source, error) {
	dir, certs := cfg.DataDir, certificate.Store(cfg.DataDir.TLS())
	used, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if cfg.Datastore.Kind != config.SQLite || err == nil && used.LeaderElect && used.CA != certs.Cert(certificate.EtcdCA) {
		return datastore.Outside{}, nil
	}
	member, err := etcd.Exists(dir.Etcd())
	if err != nil {
		return nil, err
	}
	if member {
		return etcd.New(etcd.Options{
			Dir: dir.Etcd(), Certificates: certs, Client: layout.Loopback(layout.EtcdClientPort),
			Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
		}), nil
	}
	return datastore.New(datastore.Options{Dir: dir.Server("db")}), nil
}

// snapshotBefore returns a function that saves a snapshot before Secrets are rewritten.
func snapshotBefore(cmd *cobra.Command, dataDir layout.DataDir) (func(context.Context) error, error) {
	flags := config.SnapshotFlags()
	if err := flags.Parse([]string{"--data-dir", string(dataDir)}); err != nil {
		return nil, err
	}
	_, s, err := snapshotsOf(cmd.Context(), flags)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		if err := s.Before(snapshot.BeforeSecretsEncrypt)(ctx); err != nil {
			return fmt.Errorf("%w (--skip-snapshot continues without one)", err)
		}
		return nil
	}, nil
}

func snapshotSave() *cobra.Command {
	var name, output string
	var encrypt bool
	cmd := &cobra.Command{
		Use:   "save",
		Short: "Save a snapshot, and check it",
		Long: `Save a snapshot, and check it. The server may be running or stopped.

` + volumesAreNotInIt,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&name, "name", snapshot.OnDemand, "what the snapshot is for; the file's name begins with it")
	cmd.Flags().BoolVar(&encrypt, "encrypt", false, "fail if there is no passphrase; with one, snapshots are always encrypted")
	outputFlag(cmd, &output)
	return snapshotCommand(cmd, func(cmd *cobra.Command, _ []string, s *snapshot.Snapshots, cfg *config.Server) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if err := snapshot.CheckName(name); err != nil {
			return err
		}
		if encrypt && cfg.Snapshots.Passphrase == "" {
			return fmt.Errorf("--encrypt needs a passphrase: give --snapshot-passphrase-file, or the variable %s", snapshot.PassphraseVariable)
		}
		if output != "" {
			info, err := s.Save(cmd.Context(), name)
			if info != nil {
				_, printErr := printAs(cmd.OutOrStdout(), output, info)
				err = errors.Join(err, printErr)
			}
			return err
		}
		var info *snapshot.Info
		err := progress.New(cmd.OutOrStdout()).Do("save a snapshot", func(*progress.Step) (note string, err error) {
			if info, err = s.Save(cmd.Context(), name); err != nil {
				return "", err
			}
			return fmt.Sprintf("%s, revision %d", kib(info.Size), info.Revision), nil
		})
		if info == nil {
			return err
		}
		out := cmd.OutOrStdout()
		fmt.Fprintln(out, progress.Line(info.Path))
		if !info.Encrypted {
			fmt.Fprintln(out, "It contains the keys of the cluster, and is not encrypted: keep it where only administrators can read it.")
		}
		fmt.Fprintln(out, volumesAreNotInIt)
		if info.Datastore == datastore.KindOutside {
			fmt.Fprintln(out, databaseIsNotInIt)
		}
		return err
	})
}

func snapshotList() *cobra.Command {
	var output string
	cmd := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the snapshots, newest first", Args: cobra.NoArgs}
	outputFlag(cmd, &output)
	return snapshotCommand(cmd, func(cmd *cobra.Command, _ []string, s *snapshot.Snapshots, _ *config.Server) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		all, err := s.List(cmd.Context())
		if all == nil {
			return err
		}
		done, printErr := printAs(cmd.OutOrStdout(), output, all)
		if !done {
			printErr = printSnapshots(cmd.OutOrStdout(), all)
		}
		return errors.Join(err, printErr)
	})
}

func printSnapshots(w io.Writer, all []snapshot.Info) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "FILE\tLOCATION\tCREATED\tSIZE\tREVISION\tVERSION\tENCRYPTED\tMESSAGE")
	for _, i := range all {
		revision, version, encrypted := "-", "-", "no"
		if i.Revision != 0 {
			revision = fmt.Sprint(i.Revision)
		}
		if i.Version != "" {
			version = i.Version
		}
		if i.Encrypted {
			encrypted = "yes"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.File, i.Location, i.Created.Local().Format(time.DateTime), kib(i.Size), revision, progress.Line(version), encrypted, progress.Line(i.Problem))
	}
	return t.Flush()
}

func kib(bytes int64) string { return fmt.Sprintf("%d KiB", (bytes+1023)>>10) }

func snapshotRestore() *cobra.Command {
	var yes, force bool
	var output string
	cmd := &cobra.Command{
		Use:   "restore FILE|NAME",
		Short: "Restore a snapshot, on the same machine or an empty one",
		Long: `Restore a snapshot: a file, or one of those that "polymesh snapshot ls" shows. The server has to be stopped.

The datastore is then the one of the snapshot, SQLite or etcd. From a cluster with several servers, this one is the only one afterwards, and the
others join it again. While a majority of the others runs, it refuses: they would continue the cluster next to this one.

The data dir is empty, or has the same cluster. The whole snapshot is checked before anything is changed. What is replaced is put
aside in the data dir, and can be restored itself. Afterwards start the server as usual: pods that were created after the snapshot go away,
and deleted ones come back. ` + volumesAreNotInIt + `

On a machine with another node name, the node that saved the snapshot is removed when the server starts, and its pods run here.`,
		Args:              oneArg("the name of a snapshot, as `polymesh snapshot ls` shows it, or its file"),
		ValidArgsFunction: completeSnapshots,
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&force, "force", false, "restore although other servers continue the cluster")
	outputFlag(cmd, &output)
	return snapshotCommand(cmd, func(cmd *cobra.Command, args []string, s *snapshot.Snapshots, cfg *config.Server) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if force {
			s = s.Anyway()
		}
		restore := func() (*snapshot.Restored, error) {
			r, err := s.Restore(cmd.Context(), args[0])
			return r, orAnyway(err, "--force")
		}
		out := cmd.OutOrStdout()
		if _, err := os.Stat(cfg.DataDir.Server("db")); err == nil {
			if !yes {
				if err := s.MayRestore(cmd.Context(), args[0]); err != nil {
					return orAnyway(err, "--force")
				}
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "This replaces the cluster's state in %s. What is there is put aside.\n", cfg.DataDir)
			if err := confirm(cmd, yes); err != nil {
				return err
			}
		}
		if output != "" {
			r, err := restore()
			if r != nil {
				_, printErr := printAs(out, output, r)
				err = errors.Join(err, printErr)
			}
			return err
		}
		var r *snapshot.Restored
		err := progress.New(out).Do("restore a snapshot", func(*progress.Step) (note string, err error) {
			r, err = restore()
			return "", err
		})
		if r != nil {
			printRestored(out, r, cfg, fmt.Sprintf("Next: start the server, for example with `systemctl start %s`.", layout.Unit))
		}
		return err
	})
}

func printRestored(out io.Writer, r *snapshot.Restored, cfg *config.Server, next string) {
	say := func(format string, args ...any) { fmt.Fprintln(out, progress.Line(fmt.Sprintf(format, args...))) }
	say("Restored the cluster of %s, saved on node %s by version %s.", r.Created.Local().Format(time.DateTime), r.Node, r.Version)
	if r.Aside != "" {
		say("What was there before: %s", r.Aside)
	}
	if r.Saved != nil {
		say("A snapshot of it: %s", r.Saved.Path)
	}
	if r.SaveError != "" {
		say("No snapshot of it could be saved: %s", r.SaveError)
	}
	switch {
	case r.ConfigFile != "":
		say("Its config file was written to %s: check what belongs to the machine, such as node-ip.", r.ConfigFile)
	case r.ConfigDiffers:
		say("This machine's config file is not the one in the snapshot, which is %s: compare them.", snapshot.RestoredConfig(cfg.DataDir))
	}
	if len(r.Settings) > 0 {
		say("Start the server with the settings of that cluster: --%s", strings.Join(r.Settings, " --"))
	}
	if r.ThisNode != r.Node {
		say("This machine's node is called %s. When the server starts, node %s is removed, and its pods run here. Volumes of local-path are bound to %s: to keep them, start the server with --node-name %s.", r.ThisNode, r.Node, r.Node, r.Node)
	}
	if r.DataDir != string(cfg.DataDir) {
		say("It was in the data dir %s, and this is %s: volumes of local-path are still expected there.", r.DataDir, cfg.DataDir)
	}
	say("%s", volumesAreNotInIt)
	if r.Datastore == datastore.KindOutside {
		say("The database is outside of the server, and was not restored: restore it with its own tools, and set --datastore-endpoint.")
	}
	sayOthers(say, r)
	say("%s", next)
}

// sayOthers prints what has to be done on the other servers of a cluster with etcd, which has one member now.
func sayOthers(say func(string, ...any), r *snapshot.Restored) {
	if len(r.Others) == 0 {
		return
	}
	say("The other servers (%s) must not start with their old data: on each of them run `polymesh reset --force`, and, when this server runs and `polymesh node list` shows them as NotReady (about a minute), `polymesh node remove NAME` here for each; then start them with --server.", strings.Join(r.Others, ", "))
}

func snapshotPrune() *cobra.Command {
	var keep int
	var names []string
	cmd := &cobra.Command{
		Use:   "prune --keep N",
		Short: "Remove all but the newest snapshots of each name",
		Long: `Remove all but the newest snapshots of each name that this node has saved of this cluster, in the folder and in S3.

Other clusters may keep theirs in the same place: those stay, and so do those of earlier versions that do not show which cluster
they are of (encrypted ones, and those in S3). It lists the latter, and "polymesh snapshot delete" removes them.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().IntVar(&keep, "keep", 5, "how many snapshots of each name stay")
	cmd.Flags().StringSliceVar(&names, "name", nil, "only snapshots of this name; may be repeated")
	return snapshotCommand(cmd, func(cmd *cobra.Command, _ []string, s *snapshot.Snapshots, _ *config.Server) error {
		done, err := s.Prune(cmd.Context(), keep, names...)
		printRemoved(cmd.OutOrStdout(), done.Removed)
		if err == nil && len(done.Removed) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "nothing to remove")
		}
		for _, i := range done.Unknown {
			fmt.Fprintf(cmd.OutOrStdout(), "left %s: nothing shows which cluster it is of; if it is this one's, `polymesh snapshot delete %s` removes it\n", progress.Line(i.Path), progress.Line(i.File))
		}
		return err
	})
}

func snapshotDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Remove snapshots, in the folder and in S3",
		Args: someArgs("the name of a snapshot, as `polymesh snapshot ls` shows it"), ValidArgsFunction: completeSnapshots,
	}
	return snapshotCommand(cmd, func(cmd *cobra.Command, args []string, s *snapshot.Snapshots, _ *config.Server) error {
		for _, file := range args {
			removed, err := s.Delete(cmd.Context(), file)
			printRemoved(cmd.OutOrStdout(), removed)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func printRemoved(w io.Writer, removed []snapshot.Info) {
	for _, i := range removed {
		fmt.Fprintln(w, "removed", progress.Line(i.Path))
	}
}

// completeSnapshots completes the names of the local snapshots, and files.
func completeSnapshots(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	flags := config.SnapshotFlags()
	for _, name := range []string{"config", "data-dir", "snapshot-dir"} {
		if given := cmd.Flags().Lookup(name); given != nil && given.Changed {
			_ = flags.Set(name, given.Value.String())
		}
	}
	_, s, err := snapshotsOf(cmd.Context(), flags)
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	all, err := s.List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for _, i := range all {
		names = append(names, i.File)
	}
	return names, cobra.ShellCompDirectiveDefault
}
