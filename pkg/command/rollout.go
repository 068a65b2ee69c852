package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/completion"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/rollout"
)

// Exit codes of a rollout that was not promoted.
const (
	exitRolledBack exitError = 2
	exitAborted    exitError = 3
)

func newRollout() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rollout",
		Short: "Roll out a new image step by step, and roll it back automatically on failure",
	}
	cmd.AddCommand(newRolloutCanary(),
		newRolloutEnd("promote", "Skip the remaining steps: the Deployment gets the new image now",
			"Promote ends the steps of a running rollout, from any machine: all requests go to the canary, the Deployment gets the new\nimage, and then they go back to it.", rollout.Promote),
		newRolloutEnd("abort", "Roll back: the Deployment keeps its image",
			"Abort ends a running rollout, from any machine: all requests go to the Deployment with its old image, and the canary is\nremoved.", rollout.Abort),
		newRolloutStatus())
	return cmd
}

// rolloutFlags adds the flags of all rollout commands. The returned functions read them, and complete names.
func rolloutFlags(cmd *cobra.Command) (output *string, options func(name string) (rollout.Options, error)) {
	output = new(string)
	flags := clusterFlags(cmd)
	outputFlag(cmd, output)
	return output, func(name string) (rollout.Options, error) {
		o := rollout.Options{Name: name, Steps: progress.New(cmd.ErrOrStderr())}
		if err := checkOutput(*output); err != nil {
			return o, err
		}
		if err := useClusterKubeconfig(); err != nil {
			return o, err
		}
		var err error
		if o.Namespace, _, err = flags.ToRawKubeConfigLoader().Namespace(); err != nil {
			return o, err
		}
		o.Cluster, err = cluster.Connect(flags, nil)
		return o, err
	}
}

func newRolloutCanary() *cobra.Command {
	var image, container, steps string
	plan := rollout.Plan{}
	cmd := &cobra.Command{
		Use:   "canary NAME",
		Short: "Send a growing share of a Deployment's requests to a new image",
		Long: `Canary runs a new image next to the Deployment NAME, and sends it a growing share of the requests by the weights of
VirtualServices. In each step the canary's error rate and 99th percentile, by the mesh's own metrics, must stay within
limits; otherwise, or if its pods do not become ready, it is rolled back automatically. After the last step the
Deployment gets the image.

Ctrl-C leaves the shares unchanged. The same command without --image, on any machine, continues with the step.

The exit code is 0 if the image was promoted, 2 if it was rolled back, 3 if it was aborted, 1 otherwise.`,
		Example: `  polymesh rollout canary api --image registry.example.com/shop/api:1.1.0
  polymesh rollout canary api --image shop/api:1.1.0 --steps 10,50,100 --interval 5m --max-error-rate 0.5 --max-p99 200ms
  polymesh rollout canary api`,
		Args:              oneArg("the name of a deployment"),
		ValidArgsFunction: completeNames("deployment"),
	}
	output, options := rolloutFlags(cmd)
	cmd.Flags().StringVar(&image, "image", "", "the new image; not needed to continue a rollout")
	cmd.Flags().StringVar(&container, "container", "", "the container that gets it (default: the only one)")
	cmd.Flags().StringVar(&steps, "steps", "10,50,100", "shares of the requests in percent, ascending; 100 is always the last")
	cmd.Flags().DurationVar(&plan.Interval.Duration, "interval", time.Minute, "how long each step lasts")
	cmd.Flags().Float64Var(&plan.MaxErrorRate, "max-error-rate", 1, "maximum share of failed canary requests, in percent")
	cmd.Flags().DurationVar(&plan.MaxP99.Duration, "max-p99", 500*time.Millisecond, "maximum 99th percentile of their latency")
	cmd.Flags().IntVar(&plan.MinRequests, "min-requests", 20, "number of requests that a step needs for a result")
	cmd.Flags().DurationVar(&plan.Timeout.Duration, "timeout", 10*time.Minute, "time limit for pods to become ready, and for a step to get --min-requests")
	_ = cmd.RegisterFlagCompletionFunc("container", func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		template := "{{ range .spec.template.spec.containers }}{{ .name }} {{ end }}"
		return completion.CompGetFromTemplate(&template, completionFactory(cmd), "", []string{"deployment", args[0]}, toComplete), cobra.ShellCompDirectiveNoFileComp
	})
	planned := []string{"steps", "interval", "max-error-rate", "max-p99", "min-requests", "timeout"}
	for _, name := range append(planned, "image") {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if plan.Steps, err = parseSteps(steps); err != nil {
			return err
		}
		for _, name := range planned {
			if image == "" && cmd.Flags().Changed(name) {
				return fmt.Errorf("--%s needs --image: a running rollout keeps its plan", name)
			}
		}
		o, err := options(args[0])
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		result, err := rollout.Canary(ctx, o, image, container, plan)
		return rolloutEnded(cmd, *output, result, err, rollout.Promoted)
	}
	return cmd
}

func parseSteps(text string) ([]int, error) {
	var steps []int
	for part := range strings.SplitSeq(text, ",") {
		step, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(part), "%"))
		if err != nil {
			return nil, fmt.Errorf("--steps %q is not a list of percentages such as 10,50,100", text)
		}
		steps = append(steps, step)
	}
	return steps, nil
}

// newRolloutEnd returns promote or abort.
func newRolloutEnd(name, short, long string, end func(context.Context, rollout.Options) (*rollout.Result, error)) *cobra.Command {
	cmd := &cobra.Command{
		Use:               name + " NAME",
		Short:             short,
		Long:              long,
		Example:           "  polymesh rollout " + name + " api -n shop",
		Args:              oneArg("the name of a deployment"),
		ValidArgsFunction: completeRollouts,
	}
	output, options := rolloutFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o, err := options(args[0])
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		result, err := end(ctx, o)
		wanted := rollout.Promoted
		if name == "abort" {
			wanted = rollout.Aborted
		}
		return rolloutEnded(cmd, *output, result, err, wanted)
	}
	return cmd
}

// rolloutEnded prints the result of a rollout, and returns its exit code.
func rolloutEnded(cmd *cobra.Command, output string, r *rollout.Result, err error, wanted rollout.Phase) error {
	if r == nil || r.State == nil {
		return err
	}
	w := progress.Escaping(cmd.ErrOrStderr())
	for _, f := range r.Findings {
		fmt.Fprintf(w, "\n%s\n", f)
	}
	if done, printErr := printAs(cmd.OutOrStdout(), output, r); done && printErr != nil {
		return errors.Join(err, printErr)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("interrupted at %d %%, which stays so: %s", r.Weight, r.Ways())
	case err != nil:
		return err
	}
	fmt.Fprintf(w, "\n%s %s\n", r.ID(), progress.Line(r.Outcome()))
	if r.Phase == rollout.Promoted {
		fmt.Fprintln(w, "Also update the image in the manifest: the next deploy applies what is there.")
	}
	if r.Phase == wanted {
		return nil
	}
	switch r.Phase {
	case rollout.RolledBack:
		return exitRolledBack
	case rollout.Aborted:
		return exitAborted
	}
	return exitError(1)
}

func newRolloutStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "Show the rollouts of a namespace, or the steps of one",
		Long: `Status shows the last rollout of each Deployment in a namespace, or what each step of one has measured.

With NAME the exit code is 0 while it is running or if it was promoted, 2 if it was rolled back, 3 if it was aborted.`,
		Example:           "  polymesh rollout status -n shop\n  polymesh rollout status api -n shop -o json",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeRollouts,
	}
	output, options := rolloutFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := ""
		if len(args) > 0 {
			name = args[0]
		}
		o, err := options(name)
		if err != nil {
			return err
		}
		if name == "" {
			states, err := rollout.List(cmd.Context(), o.Cluster, o.Namespace)
			if err != nil {
				return err
			}
			if done, err := printAs(cmd.OutOrStdout(), *output, states); done {
				return err
			}
			return printRollouts(cmd.OutOrStdout(), states, time.Now())
		}
		state, err := rollout.Get(cmd.Context(), o.Cluster, o.Namespace, name)
		if err != nil {
			return err
		}
		done, err := printAs(cmd.OutOrStdout(), *output, state)
		if !done {
			err = printRollout(cmd.OutOrStdout(), state, time.Now())
		}
		switch {
		case err != nil:
			return err
		case state.Phase == rollout.RolledBack:
			return exitRolledBack
		case state.Phase == rollout.Aborted:
			return exitAborted
		}
		return nil
	}
	return cmd
}

func printRollouts(w io.Writer, states []*rollout.State, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NAME\tPHASE\tWEIGHT\tIMAGE\tAGE\tDRIVEN BY")
	for _, s := range states {
		fmt.Fprintf(t, "%s\t%s\t%d %%\t%s\t%s\t%s\n", s.Name, s.Phase, s.Weight, s.Image, age(now, s.Started), driver(s))
	}
	return t.Flush()
}

func printRollout(w io.Writer, s *rollout.State, now time.Time) error {
	fmt.Fprintf(w, "%s, image %s in place of %s, begun %s ago\n%s", s.ID(), s.Image, progress.Line(s.Previous), age(now, s.Started), s.Phase)
	switch {
	case s.Reason != "":
		fmt.Fprintf(w, ": %s\n", progress.Line(s.Reason))
	case s.Phase.Ended():
		fmt.Fprintln(w)
	default:
		fmt.Fprintf(w, " at %d %%, driven by %s\n", s.Weight, driver(s))
	}
	if len(s.Done) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "\nSTEP\tCANARY\tSTABLE")
		for _, done := range s.Done {
			fmt.Fprintf(t, "%d %%\t%s\t%s\n", done.Weight, done.Canary, done.Stable)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if !s.Phase.Ended() && s.Driver == "" {
		fmt.Fprintf(w, "\nNo command drives it: %s\n", s.Ways())
	}
	return nil
}

// driver returns the holder of a rollout's Lease, which others can write.
func driver(s *rollout.State) string {
	switch {
	case s.Phase.Ended():
		return "-"
	case s.Driver == "":
		return "none"
	}
	return progress.Line(s.Driver)
}

func age(now time.Time, since metav1.Time) string { return duration.HumanDuration(now.Sub(since.Time)) }

// completionFactory accesses the cluster of a command line that is being completed.
func completionFactory(cmd *cobra.Command) cmdutil.Factory {
	_ = useClusterKubeconfig() // without a cluster there is nothing to complete
	flags := genericclioptions.NewConfigFlags(true)
	for name, to := range map[string]*string{"kubeconfig": flags.KubeConfig, "context": flags.Context, "namespace": flags.Namespace} {
		if f := cmd.Flags().Lookup(name); f != nil {
			*to = f.Value.String()
		}
	}
	return cmdutil.NewFactory(flags)
}

// completeNames completes names of a kind of objects in the namespace.
func completeNames(kind string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return completion.CompGetResource(completionFactory(cmd), kind, toComplete), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeRollouts completes Deployments that have a rollout.
func completeRollouts(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const none = cobra.ShellCompDirectiveNoFileComp
	if len(args) > 0 {
		return nil, none
	}
	factory := completionFactory(cmd)
	namespace, _, err := factory.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return nil, none
	}
	client, err := factory.KubernetesClientSet()
	if err != nil {
		return nil, none
	}
	names, err := rollout.Names(cmd.Context(), client, namespace)
	if err != nil {
		return nil, none
	}
	return names, none
}
