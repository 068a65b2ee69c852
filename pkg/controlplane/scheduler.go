package controlplane

import (
	"context"
	"strconv"

	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/cmd/kube-scheduler/app/options"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeflags"
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
	return kubeflags.Merge(map[string]string{
		"kubeconfig":   kubeconfig,
		"leader-elect": strconv.FormatBool(s.opts.Datastore.LeaderElect),
		"profiling":    "false",
		"secure-port":  "0",
	}, s.opts.Config.SchedulerArgs)
}

// Init parses the command line.
func (s *Scheduler) Init(context.Context) error {
	s.options = options.NewOptions()
	fs := pflag.NewFlagSet(s.Name(), pflag.ContinueOnError)
	for _, set := range s.options.Flags.FlagSets {
		fs.AddFlagSet(set)
	}
	return kubeflags.Check("kube-scheduler-arg", fs, s.args())
}

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
