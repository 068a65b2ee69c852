package addon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/diagnose"
)

// available returns nil if everything that the add-on runs is available.
func (a *Addon) available(ctx context.Context) error {
	for _, obj := range a.objects {
		var err error
		switch obj.GetKind() {
		case "Deployment":
			err = a.deploymentAvailable(ctx, obj.GetNamespace(), obj.GetName())
		case "APIService":
			err = a.apiServiceAvailable(ctx, obj)
		}
		if err != nil {
			return err
		}
	}
	if a.opts.Name == config.CoreDNS {
		return a.resolves(ctx)
	}
	return nil
}

// resolves queries the cluster's name server, at its service address, for a name that every cluster has. A Deployment stays
// available for most of a minute after its node has failed, and forever if only the network to it has.
func (a *Addon) resolves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	server := net.JoinHostPort(a.opts.ClusterDNS.String(), "53")
	// No packet is sent yet. A machine without a default route has no route to a service address; its pods do.
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", server)
	if errors.Is(err, syscall.ENETUNREACH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the cluster's name server cannot be queried: %w", err)
	}
	conn.Close()
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, server)
	}}
	name := "kubernetes.default.svc." + a.opts.ClusterDomain + "."
	if _, err := resolver.LookupNetIP(ctx, "ip4", name); err != nil {
		return fmt.Errorf("the cluster's name server does not respond at its service address: %w", err)
	}
	return nil
}

// queryTimeout is for a query that never leaves the machine.
const queryTimeout = 2 * time.Second

func (a *Addon) deploymentAvailable(ctx context.Context, namespace, name string) error {
	d, err := a.clientset.AppsV1().Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read deployment %s/%s: %w", namespace, name, err)
	}
	return diagnose.Serving(ctx, a.clientset, d)
}

func (a *Addon) apiServiceAvailable(ctx context.Context, obj *unstructured.Unstructured) error {
	got, err := a.resource(idOf(obj)).Get(ctx, obj.GetName(), metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read API service %s: %w", obj.GetName(), err)
	}
	c := meta.FindStatusCondition(condition.OfObject(got), "Available")
	switch {
	case c == nil:
		return fmt.Errorf("API %s is not available: not checked yet", obj.GetName())
	case c.Status != metav1.ConditionTrue:
		return errors.New(diagnose.Line(fmt.Sprintf("API %s is not available: %s", obj.GetName(), c.Message)))
	}
	return nil
}
