package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	operator "istio.io/istio/operator/pkg/component"
	"istio.io/istio/operator/pkg/manifest"
	"istio.io/istio/pkg/kube"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/converge"
)

// Options of the component.
type Options struct {
	// Kubeconfig is an administrator's. It is read by Start.
	Kubeconfig string
	// Profile is Istio's installation profile.
	Profile string
	// ClusterDomain is the DNS domain of services; empty is Istio's default, cluster.local.
	ClusterDomain string
	// Images are the images to install; the zero value is those that the build ships.
	Images Images
	// GatewayAPI is the file with the CRDs of Gateway API; empty for none.
	GatewayAPI string
	// Telemetry is what the proxies report by default.
	Telemetry Telemetry
	Log       *slog.Logger
}

// New returns the component that installs Istio on the cluster. It needs only the API server; its pods are pending until there is a
// node.
func New(opts Options) component.Component {
	if opts.Images == (Images{}) {
		opts.Images = BuiltIn()
	}
	return &mesh{
		log:      opts.Log,
		kube:     opts.Kubeconfig,
		crds:     opts.GatewayAPI,
		wanted:   opts.Telemetry,
		settings: settings{images: opts.Images, profile: opts.Profile, clusterDomain: opts.ClusterDomain},
		waiting:  errors.New("not started"),
	}
}

type mesh struct {
	log      *slog.Logger
	kube     string
	crds     string
	wanted   Telemetry
	settings settings

	note atomic.Pointer[string] // about Telemetry

	installation component.Background

	mu      sync.Mutex
	restore *converge.Loop // nil until the installation is done
	scaler  *scaler        // nil if there is nothing to scale
	waiting error          // what the installation waits for, nil when it is done
	health  *health        // nil if Istio is not the server's
	version string
}

var (
	_ component.Component = (*mesh)(nil)
	_ component.Versioned = (*mesh)(nil)
	_ component.Noted     = (*mesh)(nil)
)

// Name is the name of the add-on.
func (m *mesh) Name() string { return "istio" }

// Version returns the version that the server installed, empty if Istio is the user's own or there is none.
func (m *mesh) Version() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.version
}

// Init does nothing: everything needs the cluster.
func (m *mesh) Init(context.Context) error { return nil }

// Start installs in the background, and retries until it is done.
func (m *mesh) Start(ctx context.Context) error {
	m.wait(errors.New("looking for Istio in the cluster"))
	m.installation.Go(ctx, m.run)
	return nil
}

// Stop interrupts the installation; because of the record, the next start continues it.
func (m *mesh) Stop(ctx context.Context) error {
	if err := m.installation.Stop(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	restore, scaler := m.restore, m.scaler
	m.mu.Unlock()
	var errs []error
	if restore != nil {
		errs = append(errs, restore.Stop(ctx))
	}
	if scaler != nil {
		errs = append(errs, scaler.stop(ctx))
	}
	return errors.Join(errs...)
}

// Ready returns what the installation, or a control plane that the server installed, waits for. It does not check a user's own
// Istio.
func (m *mesh) Ready(ctx context.Context) error {
	m.mu.Lock()
	waiting, health, restore, scaler := m.waiting, m.health, m.restore, m.scaler
	m.mu.Unlock()
	if waiting != nil {
		return waiting
	}
	if restore != nil {
		if err := restore.Ready(); err != nil {
			return err
		}
	}
	if scaler != nil {
		if err := scaler.loop.Ready(); err != nil {
			return err
		}
	}
	if health == nil {
		return nil
	}
	return health.check(ctx)
}

// Notes implements component.Noted.
func (m *mesh) Notes(context.Context) []string { return component.Present(m.note.Load()) }

func (m *mesh) wait(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting = err
}

// run retries until it succeeds, with backoff.
func (m *mesh) run(ctx context.Context) {
	backoff := wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.1, Steps: 7, Cap: 30 * time.Second}
	for {
		err := m.reconcile(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		pause := backoff.Step()
		m.log.Warn("installing Istio failed, retrying", "err", err, "in", pause.Round(time.Millisecond).String())
		m.wait(fmt.Errorf("installing: %w", err))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// reconcile decides what to do, and does it, once.
func (m *mesh) reconcile(ctx context.Context) error {
	if !m.settings.images.Stamped() {
		return errors.New("this program was built without the hub and tag of its Istio images; build it with make")
	}
	client, err := m.connect()
	if err != nil {
		return err
	}
	want, err := m.settings.identity()
	if err != nil {
		return err
	}
	o, err := observe(ctx, client, want)
	if err != nil {
		return err
	}
	d := Decide(o, want)
	log := m.log.With("action", string(d.Action), "reason", d.Reason)
	record := o.Record
	switch d.Action {
	case Install, Finish, Upgrade:
		log.Info("installing Istio", "version", want.Version, "profile", want.Profile)
		m.wait(fmt.Errorf("installing Istio %s, profile %s", want.Version, want.Profile))
		begin := time.Now()
		if record, err = m.install(ctx, client, record, want); err != nil {
			return err
		}
		log.Info("installed Istio", "version", want.Version, "took", time.Since(begin).Round(time.Millisecond).String())
	case Keep:
		log.Debug("leaving Istio as it is")
	case Leave:
		log.Info("leaving Istio alone")
		if record == nil {
			// From now on it is the user's, even after it is uninstalled.
			record = &Record{Owner: Users, Phase: Installed}
			if err := writeRecord(ctx, client.Kube(), record); err != nil {
				return err
			}
		}
	}
	if err := m.applyGatewayAPI(ctx, client, record); err != nil {
		return err
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting = nil
	if d.Action != Leave {
		m.version = record.Version
		m.health = newHealth(ctx, client.Kube(), record)
		r := &restorer{mesh: m, client: client}
		m.restore = converge.NewLoop(m.log, converge.Interval, r.round)
		m.restore.Start(ctx)
		if m.scaler = newScaler(client, record, m.log); m.scaler != nil {
			return m.scaler.start(ctx)
		}
	}
	return nil
}

// connect returns the client for Istio's installer.
func (m *mesh) connect() (kube.CLIClient, error) {
	config, err := clientcmd.BuildConfigFromFlags("", m.kube)
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	// An installation is a burst of a hundred requests to a server in this process.
	config.QPS, config.Burst = 200, 200
	config.UserAgent = "polymesh-mesh"
	client, err := kube.NewCLIClient(kube.NewClientConfigForRestConfig(config))
	if err != nil {
		return nil, fmt.Errorf("create a client for %s: %w", config.Host, err)
	}
	return client, nil
}

// install applies the desired state and returns the new record. The record is written before the first object, so that the next
// start can finish an interrupted installation.
func (m *mesh) install(ctx context.Context, client kube.CLIClient, record *Record, want Identity) (*Record, error) {
	next := &Record{Owner: Ours, Phase: Installing, Identity: want}
	if record != nil {
		next.Objects, next.Shared, next.IngressClass, next.GatewayAPI = record.Objects, record.Shared, record.IngressClass, record.GatewayAPI
		next.Telemetry = record.Telemetry
	}
	if err := writeRecord(ctx, client.Kube(), next); err != nil {
		return nil, err
	}
	sets, merged, err := m.settings.manifests(client, console{m.log})
	if err != nil {
		return nil, err
	}
	if !next.IngressClass && hasIngress(sets) {
		if err := applyIngressClass(ctx, client.Kube()); err != nil {
			return nil, err
		}
		next.IngressClass = true
	}
	i := &installer{client: client, values: merged, log: m.log}
	if err := i.install(ctx, sets, next.Objects[ownPlane] == ""); err != nil {
		return nil, err
	}
	slices.Sort(i.shared)
	next.Phase, next.Objects, next.Shared = Installed, i.objects, slices.Compact(i.shared)
	if err := writeRecord(ctx, client.Kube(), next); err != nil {
		return nil, err
	}
	return next, nil
}

func hasIngress(sets []manifest.ManifestSet) bool {
	return len(manifest.ExtractComponent(sets, operator.IngressComponentName)) > 0
}
