package encryption

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/layout"
)

// joinLimit is the time for a server that joins to register its node.
const joinLimit = 10 * time.Minute

// ServerState is how far a server is with the keys.
type ServerState string

// States of a server.
const (
	// Current is a server whose API server has loaded the keys.
	Current ServerState = "current"
	// Behind is one whose API server has loaded others.
	Behind ServerState = "behind"
	// Away is one whose API server does not run.
	Away ServerState = "away"
	// Silent is one that does not report its keys.
	Silent ServerState = "silent"
)

// Server is one of several servers.
type Server struct {
	Name  string      `json:"name"`
	State ServerState `json:"state"`
	// Hash is that of the encryption configuration which the API server has loaded, sha256:HEX, as in the API server's metric
	// apiserver_encryption_config_controller_last_config_info. Empty if it is not known.
	Hash string `json:"hash,omitempty"`
}

// problem is why the keys cannot change, and what to do; empty for a server that is current.
func (s Server) problem() string {
	switch s.State {
	case Current:
		return ""
	case Away:
		return fmt.Sprintf("%s is away: start it, or remove it with `polymesh node remove %s`", s.Name, s.Name)
	case Silent:
		return fmt.Sprintf("%s does not report its keys: it runs an earlier version, upgrade it", s.Name)
	}
	if s.Hash == "" {
		return fmt.Sprintf("%s has not reported its keys yet: `polymesh status` there shows why, unless it has an encryption-provider-config of its own", s.Name)
	}
	return fmt.Sprintf("%s has not loaded the keys yet: `polymesh status` there shows why", s.Name)
}

// notCurrentError names the servers that keep the keys from changing.
type notCurrentError []Server

func (e notCurrentError) Error() string {
	problems := make([]string, len(e))
	for i, s := range e {
		problems[i] = s.problem()
	}
	return "all servers must have the present keys of Secrets before they change: " + strings.Join(problems, "; ")
}

// servers returns all servers, also those that do not run, and the records of servers that were removed. hash is that of the present keys.
func (c *connection) servers(ctx context.Context, hash string) (all []Server, removed []bootstrap.Server, err error) {
	records, err := c.shares().Servers(ctx)
	if err != nil {
		return nil, nil, err
	}
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: layout.ServerLabel})
	if err != nil {
		return nil, nil, fmt.Errorf("list the servers: %w", err)
	}
	// API servers renew their addresses in it, and those of others expire after 15 seconds (DefaultEndpointReconcilerTTL in
	// k8s.io/kubernetes/pkg/controlplane).
	slice, err := c.client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, nil, fmt.Errorf("look for the API servers: %w", err)
	}
	runs := map[string]bool{}
	if err == nil {
		for _, endpoint := range slice.Endpoints {
			for _, address := range endpoint.Addresses {
				runs[address] = true
			}
		}
	}
	all, removed = judge(records, nodes.Items, runs, hash, time.Now())
	return all, removed, nil
}

// judge decides about each server. runs has the addresses of the API servers that run.
func judge(records []bootstrap.Server, nodes []corev1.Node, runs map[string]bool, hash string, now time.Time) (all []Server, removed []bootstrap.Server) {
	isNode := map[string]bool{}
	for _, n := range nodes {
		isNode[n.Name] = true
	}
	for _, r := range records {
		s := Server{Name: r.Name, Hash: r.Loaded, State: Behind}
		// One that was started there later has the address of a machine that was set up again with another name.
		replaced := slices.ContainsFunc(records, func(other bootstrap.Server) bool { return other.Address == r.Address && other.Started.After(r.Started) })
		switch runs := runs[r.Address.String()]; {
		case (!runs || replaced) && !isNode[r.Name] && (r.Registered || now.Sub(r.Started) > joinLimit):
			removed = append(removed, r)
			continue
		case !runs:
			s.State = Away
		case r.Loaded == hash:
			s.State = Current
		}
		delete(isNode, r.Name)
		all = append(all, s)
	}
	for name := range isNode {
		all = append(all, Server{Name: name, State: Silent})
	}
	slices.SortFunc(all, func(a, b Server) int { return strings.Compare(a.Name, b.Name) })
	return all, removed
}

// await waits until all API servers have loaded the configuration. Unless it is patient, a server that is away is an error at once, as is
// any other failure.
func (c *connection) await(ctx context.Context, text []byte, patient bool) error {
	deadline := time.NewTimer(reloadLimit)
	defer deadline.Stop()
	for {
		err := c.current(ctx, hashOf(text))
		var behind notCurrentError
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case patient, errors.Is(err, errNotLoaded): // also while etcd elects a leader
		case !errors.As(err, &behind), slices.ContainsFunc(behind, func(s Server) bool { return s.State != Behind }):
			return err
		}
		if c.Waiting != nil {
			c.Waiting(err.Error())
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline.C:
			return fmt.Errorf("after %s: %w", reloadLimit, err)
		case <-time.After(c.ReloadInterval() / 5):
		}
	}
}

var errNotLoaded = errors.New("the API server has not loaded the keys of Secrets: is another encryption-provider-config set with --kube-apiserver-arg?")

// current returns an error if an API server has not loaded the configuration with this hash.
func (c *connection) current(ctx context.Context, hash string) error {
	if !c.several() {
		have, err := loaded(ctx, c.client)
		if err == nil && have != hash {
			err = errNotLoaded
		}
		return err
	}
	all, removed, err := c.servers(ctx, hash)
	if err != nil {
		return err
	}
	for _, r := range removed {
		if err := c.shares().Forget(ctx, r); err != nil {
			return err
		}
	}
	all = slices.DeleteFunc(all, func(s Server) bool { return s.State == Current })
	if len(all) == 0 {
		return nil
	}
	return notCurrentError(all)
}

// loadedPattern finds the hash in the API server's metrics (k8s.io/apiserver/pkg/server/options/encryptionconfig/metrics).
var loadedPattern = regexp.MustCompile(`(?m)^apiserver_encryption_config_controller_last_config_info\{[^}\n]*\bhash="(sha256:[0-9a-f]{64})"`)

// loaded returns the hash of the configuration that an API server has loaded, empty if it has none.
func loaded(ctx context.Context, client kubernetes.Interface) (string, error) {
	text, err := client.Discovery().RESTClient().Get().AbsPath("/metrics").Do(ctx).Raw()
	if err != nil {
		return "", fmt.Errorf("ask the API server which keys of Secrets it has loaded: %w", err)
	}
	if found := loadedPattern.FindSubmatch(text); found != nil {
		return string(found[1]), nil
	}
	return "", nil
}
