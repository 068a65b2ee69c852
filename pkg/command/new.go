package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/workflow/project"
	"polymesh.dev/polymesh/pkg/workflow/scaffold"
)

func newNew() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "new",
		Short: "Create a project, or a service in one",
		Example: `  polymesh new project shop --lang go,python
  cd shop
  polymesh new service orders --lang java
  polymesh deploy`,
	}
	cmd.AddCommand(newNewProject(), newNewService())
	return cmd
}

func newNewProject() *cobra.Command {
	var o scaffold.ProjectOptions
	cmd := &cobra.Command{
		Use:   "project NAME|DIR",
		Short: "Create a project: a folder for `polymesh deploy`",
		Long: `Project creates a folder with polymesh.yaml and the folders services/, k8s/ and istio/, in which the project has a namespace
with sidecars, STRICT mTLS, and a host on Istio's gateway. With --lang it also has services.`,
		Example:           "  polymesh new project shop\n  polymesh new project work/shop --lang go,python --host shop.example.org",
		Args:              oneArg("the project's name, or its folder"),
		ValidArgsFunction: completeDir,
	}
	cmd.Flags().StringVar(&o.Name, "name", "", "the project's name (default: the folder's)")
	cmd.Flags().StringVar(&o.Host, "host", "", "host that the gateway accepts (default: NAME.example.com)")
	cmd.Flags().StringSliceVar(&o.Languages, "lang", nil, "languages that each get a service: "+strings.Join(scaffold.LanguageNames(), ", "))
	completeLanguage(cmd)
	run := planFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return run(cmd, func() (*scaffold.Plan, error) { return scaffold.NewProject(args[0], o) }, func(w io.Writer, p *scaffold.Plan) {
			if here, err := os.Getwd(); err != nil || here != p.Dir {
				fmt.Fprintf(w, "  cd %s\n", args[0])
			}
			if len(p.Services) == 0 {
				fmt.Fprintln(w, "  polymesh new service NAME --lang go")
			}
		})
	}
	return cmd
}

func newNewService() *cobra.Command {
	var o scaffold.ServiceOptions
	var dir, lang string
	cmd := &cobra.Command{
		Use:   "service NAME --lang LANGUAGE",
		Short: "Create a service in a project: source, tests, manifests and a route",
		Long: `Service adds a service to the project that the current folder is part of: services/NAME with its source, its tests and a
Dockerfile that runs them, k8s/NAME with its Deployment, Service, ConfigMap, HorizontalPodAutoscaler and PodDisruptionBudget,
and istio/NAME with the route /NAME and a circuit breaker.`,
		Example:           "  polymesh new service orders --lang java\n  polymesh new service stock --lang rust -C shop",
		Args:              oneArg("the service's name"),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&lang, "lang", "", "language: "+strings.Join(scaffold.LanguageNames(), ", "))
	cmd.Flags().StringVarP(&dir, "dir", "C", "", "the project's folder (default: the nearest one at or above the current folder with a "+project.File+")")
	cmd.Flags().StringVar(&o.Gateway, "gateway", "", "Gateway of the route: NAME or NAMESPACE/NAME (default: the project's)")
	cmd.Flags().StringVar(&o.Host, "host", "", "host of the route (default: the Gateway's)")
	_ = cmd.MarkFlagDirname("dir")
	completeLanguage(cmd)
	run := planFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return run(cmd, func() (*scaffold.Plan, error) {
			at, err := dir, error(nil)
			if at == "" {
				at, err = project.Find(".")
			}
			if err != nil {
				return nil, err
			}
			p, err := project.Load(at)
			if err != nil {
				return nil, err
			}
			return scaffold.NewService(p, args[0], lang, o)
		}, func(io.Writer, *scaffold.Plan) {})
	}
	return cmd
}

// planFlags adds the flags that the commands share. The returned function creates the plan and applies it; next prints
// the steps before deploy.
func planFlags(cmd *cobra.Command) func(cmd *cobra.Command, plan func() (*scaffold.Plan, error), next func(io.Writer, *scaffold.Plan)) error {
	var output string
	force := cmd.Flags().Bool("force", false, "overwrite existing files")
	dryRun := cmd.Flags().Bool("dry-run", false, "only show what would be created")
	outputFlag(cmd, &output)
	return func(cmd *cobra.Command, plan func() (*scaffold.Plan, error), next func(io.Writer, *scaffold.Plan)) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		p, err := plan()
		if err != nil {
			return err
		}
		if err := p.Refuse(); err != nil && !*force {
			return err
		}
		if !*dryRun {
			if err := p.Write(ctx); err != nil {
				if errors.Is(err, context.Canceled) {
					return errors.New("interrupted; nothing was created")
				}
				return err
			}
		}
		w := cmd.OutOrStdout()
		if done, err := printAs(w, output, p); done {
			return err
		}
		printPlan(w, p)
		if *dryRun {
			return nil
		}
		fmt.Fprintln(w, "\nNext:")
		next(w, p)
		fmt.Fprintln(w, "  polymesh deploy")
		for _, s := range p.Services {
			fmt.Fprintf(w, "  curl -H 'Host: %s' http://NODE%s\n", p.Host, s.Path)
		}
		if len(p.Services) > 0 {
			fmt.Fprintln(w, "NODE is the gateway's address: polymesh kubectl get service -n istio-system istio-ingressgateway")
		}
		return nil
	}
}

func printPlan(w io.Writer, p *scaffold.Plan) {
	fmt.Fprintln(w, p.Dir)
	for _, f := range p.Files {
		fmt.Fprintf(w, "  %-9s  %s\n", f.Action, filepath.FromSlash(f.Path))
	}
}

func completeLanguage(cmd *cobra.Command) {
	var all []cobra.Completion
	for _, l := range scaffold.Languages() {
		all = append(all, cobra.CompletionWithDesc(l.Name, l.About))
	}
	_ = cmd.RegisterFlagCompletionFunc("lang", cobra.FixedCompletions(all, cobra.ShellCompDirectiveNoFileComp))
}
