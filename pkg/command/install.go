package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/reset"
	"polymesh.dev/polymesh/pkg/service"
)

func newInstall() *cobra.Command {
	var opts service.Options
	var dryRun bool
	var output string
	var timeout time.Duration
	serverSet, agentSet := config.RoleFlags()
	cmd := &cobra.Command{
		Use:   "install [server|agent] [flags of polymesh server or polymesh agent]",
		Short: "Install this file, and a server or an agent as a service of systemd",
		Long: `Install this file as ` + service.Program + `, with the links kubectl and istioctl where the machine has none, and
a server or an agent as the systemd service polymesh, which starts with the machine. With --server, or POLYMESH_URL, it is an agent,
unless the role is named.

Flags of ` + "`polymesh server` or `polymesh agent`" + ` become the service's. The variables POLYMESH_… that are settings, and secrets, go into a file
that only root can read. Without flags and variables, an installed service keeps its settings. The config file stays as it is.

It can be run again, with a newer file too: it changes only what differs. What others have put at one of these places is left
alone. ` + "`polymesh uninstall`" + ` undoes it.`,
		Example: `  sudo ./polymesh install --now
  sudo ./polymesh install --now --mesh-profile demo --tls-san api.example.com
  sudo ./polymesh install --now --server https://HOST:6443 --token-file token
  sudo ./polymesh install server --now --server https://HOST:6443 --token-file token
  sudo ./polymesh install --dry-run`,
		Args: func(_ *cobra.Command, args []string) error {
			for _, arg := range args {
				if role := service.Role(arg); len(args) > 1 || role != service.Server && role != service.Agent {
					return fmt.Errorf("%q is neither server nor agent (see `polymesh install --help`)", arg)
				}
			}
			return nil
		},
		ValidArgs: []string{string(service.Server), string(service.Agent)},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("install needs root: run it with sudo")
			}
			settings, err := serviceSettings(args, serverSet, agentSet)
			if err != nil {
				return err
			}
			if opts.FileOnly && (opts.Now || settings != nil && len(settings.Args) > 0) {
				return errors.New("--no-service goes neither with --now nor with flags of `polymesh server` or `polymesh agent`: they are for the service")
			}
			if settings != nil && settings.Role == service.Server && len(args) == 0 {
				if role, err := thisMachine().Role(); err != nil {
					return err
				} else if role == service.Agent {
					return errors.New("this machine's service is an agent: give --server or POLYMESH_URL again, or name the role: `polymesh install server`")
				}
			}
			if settings != nil && len(settings.Args) == 0 && len(settings.Environment) == 0 {
				// The role alone is no setting, if it is the installed one.
				if role, err := thisMachine().Role(); err != nil {
					return err
				} else if role == settings.Role {
					settings = nil
				}
			}
			opts.Settings = settings
			if opts.File, err = payload.Shipped(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			machine := thisMachine()
			var plan *service.Plan
			if dryRun {
				plan, err = machine.Plan(ctx, opts)
			} else {
				plan, err = machine.Install(ctx, opts, progress.New(cmd.ErrOrStderr()))
			}
			if err != nil {
				return err
			}
			if done, err := printAs(cmd.OutOrStdout(), output, plan); done {
				return err
			}
			return printInstall(cmd.OutOrStdout(), plan, dryRun)
		},
	}
	cmd.Flags().BoolVar(&opts.Now, "now", false, "start the service, or restart it where it runs what was installed before, and wait until the node is Ready")
	cmd.Flags().BoolVar(&opts.FileOnly, "no-service", false, "install the file and its links alone, for machines without systemd")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be done, and do nothing")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait for the node, with --now")
	// -o is that of `polymesh server`.
	cmd.Flags().StringVar(&output, "output", "", "output format: json or yaml (default: a list)")
	complete(cmd, "output", []string{"json", "yaml"})
	serverFlags(cmd, serverSet)
	cmd.Flags().AddFlagSet(agentSet.FlagSet)
	return cmd
}

// serviceSettings returns the settings that were given; nil for none.
func serviceSettings(args []string, server, agent *config.Flags) (*service.Settings, error) {
	role, flags := service.Server, server
	switch {
	case len(args) > 0:
		role = service.Role(args[0])
	case agent.Lookup("server").Changed || os.Getenv("POLYMESH_URL") != "" || os.Getenv("POLYMESH_SERVER") != "":
		role = service.Agent
	}
	if role == service.Server && len(args) == 0 && os.Getenv("POLYMESH_TOKEN") != "" {
		return nil, errors.New("POLYMESH_TOKEN is set, but no server of the cluster: set POLYMESH_URL too")
	}
	var wrong error
	if role == service.Agent {
		flags = agent
		server.VisitAll(func(f *pflag.Flag) {
			if f.Changed && agent.Lookup(f.Name) == nil && wrong == nil {
				wrong = fmt.Errorf("--%s is a flag of `polymesh server`, and this installs `polymesh agent`: for a server that joins others, name the role: `polymesh install server`", f.Name)
			}
		})
	}
	if wrong != nil {
		return nil, wrong
	}
	if reset := flags.Lookup("cluster-reset"); reset != nil && reset.Changed {
		return nil, errors.New("--cluster-reset is done once, not at each start of a service: run `polymesh server --cluster-reset` with the service stopped")
	}
	arguments, err := flags.CommandLine()
	if err != nil {
		return nil, err
	}
	environment, err := flags.Environment(os.Environ())
	if err != nil || len(args) == 0 && len(arguments) == 0 && len(environment) == 0 {
		return nil, err
	}
	return &service.Settings{Role: role, Args: arguments, Environment: environment}, nil
}

func thisMachine() *service.Machine { return &service.Machine{Path: os.Getenv("PATH")} }

func printInstall(out io.Writer, plan *service.Plan, dryRun bool) error {
	if dryRun {
		return printChanges(out, plan.Changes)
	}
	for _, c := range plan.Changes {
		if c.Action == service.Leave {
			fmt.Fprintf(out, "%s is left: %s\n", c.Target, progress.Line(c.Reason))
		}
	}
	if !plan.Changed() {
		_, err := fmt.Fprintln(out, "Everything was there already; nothing was changed.")
		return err
	}
	return nil
}

func printChanges(out io.Writer, changes []service.Change) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range changes {
		reason := ""
		if c.Reason != "" {
			reason = "\t" + progress.Line(c.Reason)
		}
		fmt.Fprintf(t, "%s\t%s%s\n", c.Action, progress.Line(c.Target), reason)
	}
	return t.Flush()
}

func newUninstall() *cobra.Command {
	var yes, withReset, dryRun bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop the service and remove what `polymesh install` installed",
		Long: `Stop the service polymesh and remove what ` + "`polymesh install`" + ` installed: the systemd unit, the links kubectl and istioctl,
and the file itself. It lists what goes and what stays before it asks. What has been changed since the install, or was not
installed by it, stays.

Data and pods stay, unless --reset removes them as ` + "`polymesh reset`" + ` does.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("uninstall needs root: run it with sudo")
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			machine, out := thisMachine(), cmd.OutOrStdout()
			removal, err := machine.PlanRemoval()
			if err != nil {
				return err
			}
			data := reset.Options{DataDir: dataDirFromEnv(), Kubeconfig: layout.DefaultKubeconfig}
			cfg, installed, err := machine.Installed()
			switch {
			case err != nil && withReset:
				return fmt.Errorf("find the service's data: %w. Or run `polymesh reset` with its --data-dir, and then `polymesh uninstall`", err)
			case installed:
				data = reset.Options{DataDir: cfg.DataDir, Kubeconfig: cfg.Kubeconfig}
			}
			// A server that is not this service would start it again.
			var store int
			if lock, err := datadir.Look(data.DataDir); !withReset && (installed || err != nil || !lock.Held) {
				if store, err = observe.Running(data.DataDir); err != nil {
					return err
				}
			}
			wipe := &reset.Plan{}
			if withReset {
				if wipe, err = reset.Look(ctx, data); err != nil {
					return err
				}
			}
			if removal.Empty() && len(wipe.Remove) == 0 && store == 0 {
				_, err := fmt.Fprintln(out, "Nothing is installed; nothing was removed.")
				return err
			}
			stays := string(data.DataDir)
			if _, err := os.Stat(stays); withReset || err != nil {
				stays = ""
			}
			listRemoval(out, removal, wipe, stays, store)
			if dryRun {
				return nil
			}
			if err := confirm(cmd, yes); err != nil {
				return err
			}
			// A server can only leave while it runs.
			if err := wipe.LeaveCluster(ctx, out); err != nil {
				return err
			}
			steps := progress.New(cmd.ErrOrStderr())
			if err := machine.Stop(ctx, removal, steps); err != nil {
				return err
			}
			if store != 0 {
				if err := observe.End(ctx, data.DataDir); err != nil {
					return fmt.Errorf("the file and the service are still installed: %w", err)
				}
			}
			if err := wipe.Run(ctx, out); err != nil {
				return fmt.Errorf("the file and the service are still installed: %w", err)
			}
			return machine.Remove(ctx, removal, steps)
		},
	}
	cmd.Flags().BoolVar(&withReset, "reset", false, "remove pods and data too: volumes and the datastore are lost")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be removed, and do nothing")
	return cmd
}

// listRemoval prints what will be removed and what will stay. dataDir is that of pods and data that stay; empty if there are none. store is the
// process of a store whose data stay; 0 if there is none.
func listRemoval(out io.Writer, removal *service.Removal, wipe *reset.Plan, dataDir string, store int) {
	plan := &reset.Plan{Remove: wipe.Remove, Leave: wipe.Leave}
	for _, c := range removal.Changes {
		switch line := progress.Line(c.Target); {
		case c.Action == service.Leave:
			plan.Leave = append(plan.Leave, line+": "+progress.Line(c.Reason))
		case c.Action == service.Stop:
			plan.Remove = append(plan.Remove, "the service "+line+" (stopped, and not started with the machine any more)")
		default:
			plan.Remove = append(plan.Remove, line)
		}
	}
	if store != 0 {
		plan.Remove = append(plan.Remove, fmt.Sprintf("the store of metrics, logs and traces, process %d (stopped; what it has recorded stays)", store))
	}
	if dataDir != "" {
		plan.Leave = append(plan.Leave, fmt.Sprintf("pods and data, in %s: `polymesh reset`, while there is a polymesh file, or --reset removes them", dataDir))
	}
	first := ""
	if len(wipe.Remove) > 0 {
		first = lost(wipe)
	}
	listPlan(out, plan, first)
}
