package controlplane

import (
	"context"
	"maps"

	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
)

// Scheduler is the component "kube-scheduler".
type Scheduler struct {
	component.Task
	opts    Options
	options *options.Options
}

// NewScheduler returns the scheduler, not yet started.
func NewScheduler(o Options) *Scheduler { return &Scheduler{Task: component.NewTask(), opts: o} }

// Name implements component.Component.
func (s *Scheduler) Name() string { return "kube-scheduler" }

// Version is the version of Kubernetes.
func (s *Scheduler) Version() string { return version.Get().GitVersion }

func (s *Scheduler) args() []string {
	kubeconfig := s.opts.Config.DataDir.Kubeconfig(s.Name())
	args := map[string]string{"kubeconfig": kubeconfig, "profiling": "false"}
	maps.Copy(args, separateFlags(s.opts, layout.SchedulerPort))
	return kubeflags.Merge(args, s.opts.Config.SchedulerArgs)
}

// Init parses the command line.
func (s *Scheduler) Init(context.Context) error {
	s.options = options.NewOptions()
	fs := pflag.NewFlagSet(s.Name(), pflag.ContinueOnError)
	for _, set := range s.options.Flags.FlagSets {
		fs.AddFlagSet(set)
	}
	if err := kubeflags.Check("kube-scheduler-arg", fs, s.args()); err != nil {
		return err
	}
	return checkLeaderElect(s.opts, "kube-scheduler-arg", s.options.LeaderElection.LeaderElect)
}

// healthPort implements programmed.
func (s *Scheduler) healthPort() int { return s.options.SecureServing.BindPort }

// Start runs the scheduler.
func (s *Scheduler) Start(ctx context.Context) error {
	kubeflags.Log(s.Name(), s.args())
	s.Go(ctx, func(ctx context.Context) error {
		completed, scheduler, err := app.Setup(ctx, s.options)
		if err != nil {
			return err
		}
		return app.Run(ctx, completed, scheduler)
	})
	return nil
}

// Ready returns nil at once: the scheduler has no health endpoint without a port, and if it cannot start, the process exits.
func (s *Scheduler) Ready(context.Context) error { return nil }
