package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
)

// programs are upstream's commands for the components that run as a Program, by name.
var programs = map[string]func() *cobra.Command{
	"kube-controller-manager": controllers.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
}

// IsProgram reports whether a name is that of a component which RunProgram runs.
func IsProgram(name string) bool { return programs[name] != nil }

// RunProgram runs a component as this process, with upstream's own command, and returns its exit code. A Program starts it.
func RunProgram(name string, args []string) int {
	cmd := programs[name]()
	cmd.SetArgs(args)
	return cli.Run(cmd)
}

// Program is the controller manager or the scheduler in its own process, where several servers elect which one works. A lost lease,
// for example on a slow disk, makes upstream's code end the process: here that is not the API server's and the kubelet's, and the child is
// started again. On a single server both run inside the server, where they need less memory and no lease.
type Program struct {
	of    programmed
	log   *slog.Logger
	child *component.Child
	http  *http.Client
}

// programmed is a component that can also run as a Program.
type programmed interface {
	component.Component
	component.Versioned
	args() []string
	// healthPort is the port on loopback for /healthz; 0 if the user has switched it off. Init has been called.
	healthPort() int
}

// Separate returns the component as a Program where the datastore's servers elect a leader, and otherwise itself.
func Separate(o Options, c programmed, log *slog.Logger) component.Component {
	if !o.Datastore.LeaderElect {
		return c
	}
	return &Program{of: c, log: log.With("component", c.Name())}
}

// Name implements component.Component.
func (p *Program) Name() string { return p.of.Name() }

// Version implements component.Versioned.
func (p *Program) Version() string { return p.of.Version() }

// PID implements component.Process.
func (p *Program) PID() int {
	if p.child == nil {
		return 0
	}
	return p.child.PID()
}

// Init checks the command line, in this process.
func (p *Program) Init(ctx context.Context) error {
	if err := p.of.Init(ctx); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program's own file: %w", err)
	}
	p.child = &component.Child{Path: self, Args: append([]string{p.Name()}, p.of.args()...), Env: os.Environ(), Output: os.Stderr, Log: p.log}
	// The certificate is made by the component at each start, and the address is loopback: the answer only reports that it runs.
	p.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	return nil
}

// Start starts the process.
func (p *Program) Start(ctx context.Context) error {
	kubeflags.Log(p.Name(), p.of.args())
	return p.child.Start(ctx)
}

// Ready returns nil if the process answers its health check. That does not show who leads: on the other servers it waits.
func (p *Program) Ready(ctx context.Context) error {
	if p.PID() == 0 {
		return errors.New("the process has ended and will be started again; the log has the reason")
	}
	port := p.of.healthPort()
	if port == 0 {
		return nil
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+layout.Loopback(port).String()+"/healthz", nil)
	if err != nil {
		return err
	}
	response, err := p.http.Do(request)
	if err != nil {
		return errors.New("not responding yet")
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(response.Body, 64<<10))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("/healthz returned %d", response.StatusCode)
	}
	return nil
}

// Stop ends the process.
func (p *Program) Stop(ctx context.Context) error {
	if p.child == nil {
		return nil
	}
	return p.child.Stop(ctx)
}

// checkLeaderElect rejects a leader election that does not fit the datastore. Where no other server can exist, the component runs in the
// server's process, which the loss of a Lease would end; elsewhere, two of it would work at the same time without one.
func checkLeaderElect(o Options, setting string, elects bool) error {
	if elects == o.Datastore.LeaderElect {
		return nil
	}
	return fmt.Errorf("--%s leader-elect=%t is refused: with this datastore it is %t. Remove it", setting, elects, o.Datastore.LeaderElect)
}

// separateFlags are the flags of a Program's health check, and the component's own where it runs in the server.
func separateFlags(o Options, port int) map[string]string {
	if !o.Datastore.LeaderElect {
		return map[string]string{"leader-elect": "false", "secure-port": "0"}
	}
	return map[string]string{"leader-elect": "true", "secure-port": strconv.Itoa(port), "bind-address": layout.Loopback(port).Addr().String()}
}
