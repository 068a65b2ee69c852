package rollout

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"polymesh.dev/polymesh/pkg/ssa"
)

var (
	virtualServices  = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"}
	destinationRules = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "destinationrules"}
	gatewayRoutes    = []schema.GroupVersionResource{
		{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "httproutes"},
		{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "grpcroutes"},
	}
)

// rootNamespace is the namespace of DestinationRules that apply to all namespaces.
const rootNamespace = "istio-system"

// routing is how requests are routed to the Deployment.
type routing struct {
	hosts []*host
	// others are the user's VirtualServices that lead to one of the hosts.
	others []unstructured.Unstructured
	// problems are reasons not to start. A rollout that is under way continues, and rolls back, in spite of them.
	problems []string
}

func (r *routing) problem(format string, args ...any) {
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

func (r *routing) services() []string {
	var names []string
	for _, h := range r.hosts {
		names = append(names, h.service)
	}
	return names
}

// leads returns a function that finds the host of a destination. A short name is in the namespace of its VirtualService.
func (r *routing) leads(own string) leads {
	return func(namespace, name string) *host {
		for _, h := range r.hosts {
			if name == h.service && namespace == own || strings.HasPrefix(name+".", h.service+"."+own+".svc.") {
				return h
			}
		}
		return nil
	}
}

// checkedRouting reads how requests are routed to the Deployment, and returns an error if weights cannot be set for all of them.
func (d *driver) checkedRouting(ctx context.Context, stable *appsv1.Deployment) (*routing, error) {
	r, err := d.routing(ctx, stable)
	if err != nil {
		return nil, err
	}
	if len(r.problems) > 0 {
		return nil, errors.New(r.problems[0])
	}
	if len(r.hosts) == 0 {
		return nil, fmt.Errorf("no Service in %s selects the pods of %s, so there are no requests to share", d.Namespace, deploymentID(d.Namespace, d.Name))
	}
	if err := d.checkGatewayAPI(ctx, r); err != nil {
		return nil, err
	}
	return r, d.checkOtherPods(ctx, r)
}

// routing reads how requests are routed to the Deployment.
func (d *driver) routing(ctx context.Context, stable *appsv1.Deployment) (*routing, error) {
	r := &routing{}
	if err := d.findServices(ctx, r, stable); err != nil {
		return nil, err
	}
	rules, err := d.list(ctx, destinationRules)
	if err != nil {
		return nil, err
	}
	domain := ""
	if slices.ContainsFunc(rules, isWildcard) {
		if domain, err = d.clusterDomain(ctx); err != nil {
			return nil, err
		}
	}
	for _, h := range r.hosts {
		d.readRules(r, h, rules, stable, domain)
	}
	return r, d.findRoutes(ctx, r)
}

// isWildcard reports whether a DestinationRule is for all hosts with a suffix.
func isWildcard(rule unstructured.Unstructured) bool {
	host, _, _ := unstructured.NestedString(rule.Object, "spec", "host")
	return strings.HasPrefix(host, "*")
}

// clusterDomain returns the domain that Istio appends to the names of Services: istiod is started with --domain, which its chart sets
// from global.proxy.clusterDomain.
func (d *driver) clusterDomain(ctx context.Context) (string, error) {
	found, err := d.Cluster.Client.AppsV1().Deployments(rootNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=istiod"})
	if err != nil {
		return "", fmt.Errorf("a DestinationRule is for a wildcard, and the cluster's domain, which decides what it matches, cannot be read from the deployment istiod -n %s: %w", rootNamespace, err)
	}
	for _, istiod := range found.Items {
		for _, c := range istiod.Spec.Template.Spec.Containers {
			for i, arg := range c.Args {
				if domain, ok := strings.CutPrefix(arg, "--domain="); ok {
					return domain, nil
				}
				if arg == "--domain" && i+1 < len(c.Args) {
					return c.Args[i+1], nil
				}
			}
		}
	}
	return "", fmt.Errorf("a DestinationRule is for a wildcard, and there is no deployment istiod -n %s whose argument --domain is the cluster's domain", rootNamespace)
}

// list returns objects of all namespaces, or of the rollout's own if the user may not read the others.
func (d *driver) list(ctx context.Context, kind schema.GroupVersionResource) ([]unstructured.Unstructured, error) {
	found, err := d.Cluster.Dynamic.Resource(kind).List(ctx, metav1.ListOptions{})
	if apierrors.IsForbidden(err) {
		found, err = d.Cluster.Dynamic.Resource(kind).Namespace(d.Namespace).List(ctx, metav1.ListOptions{})
	}
	if err != nil {
		return nil, fmt.Errorf("list the %s: %w", kind.Resource, err)
	}
	return found.Items, nil
}

// findServices finds the Services that select the Deployment's pods.
func (d *driver) findServices(ctx context.Context, r *routing, stable *appsv1.Deployment) error {
	services, err := d.Cluster.Client.CoreV1().Services(d.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the Services in %s: %w", d.Namespace, err)
	}
	for _, s := range services.Items {
		if len(s.Spec.Selector) == 0 || !labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(stable.Spec.Template.Labels)) {
			continue
		}
		if _, ok := s.Spec.Selector[d.state.VersionLabel]; ok {
			r.problem("service/%s -n %s selects pods by their label %s, so it would not select the canary's pods: remove it from spec.selector", s.Name, s.Namespace, d.state.VersionLabel)
			continue
		}
		h := &host{service: s.Name, subsets: map[string]subset{}}
		for _, port := range s.Spec.Ports {
			if !speaksHTTP(port) && port.Protocol != corev1.ProtocolUDP {
				h.tcp = append(h.tcp, port.Port)
			}
		}
		r.hosts = append(r.hosts, h)
	}
	return nil
}

// speaksHTTP reports whether Istio treats a port as HTTP, by its name or appProtocol. Without either, Istio detects the protocol from
// the first bytes, and weights apply to HTTP.
func speaksHTTP(port corev1.ServicePort) bool {
	protocol, _, _ := strings.Cut(port.Name, "-")
	if port.AppProtocol != nil {
		protocol = *port.AppProtocol
	}
	return !slices.Contains([]string{"tcp", "tls", "https", "mongo", "mysql", "redis"}, strings.ToLower(protocol))
}

// readRules reads the DestinationRules of a host, without those of the rollout.
func (d *driver) readRules(r *routing, h *host, rules []unstructured.Unstructured, stable *appsv1.Deployment, clusterDomain string) {
	h.subsets[""] = subset{}
	var inherited *unstructured.Unstructured
	best := 0
	here := false
	full := h.service + "." + d.Namespace + ".svc."
	for i := range rules {
		rule := &rules[i]
		id := fmt.Sprintf("destinationrule/%s -n %s", rule.GetName(), rule.GetNamespace())
		name, _, _ := unstructured.NestedString(rule.Object, "spec", "host")
		if rule.GetLabels()[rolloutLabel] == d.Name && rule.GetNamespace() == d.Namespace {
			continue
		}
		if rule.GetNamespace() == d.Namespace && rule.GetName() == ownName(h.service) {
			r.problem("%s exists: a rollout needs this name", id)
		}
		exact := name == h.service && rule.GetNamespace() == d.Namespace || strings.HasPrefix(name+".", full)
		suffix, wild := strings.CutPrefix(name, "*")
		if !exact && (!wild || !strings.HasSuffix(full+clusterDomain, suffix)) {
			continue
		}
		if _, selects, _ := unstructured.NestedMap(rule.Object, "spec", "workloadSelector"); selects && exact {
			r.problem("%s applies only to some callers of service/%s (workloadSelector), which would not have the canary's subset: remove it during the rollout", id, h.service)
		}
		if exact && rule.GetNamespace() != d.Namespace && rule.GetNamespace() != rootNamespace {
			r.problem("%s replaces, for the callers in %s, the rule of namespace %s for service/%s, so they would not have the canary's subset: move it to %s",
				id, rule.GetNamespace(), d.Namespace, h.service, d.Namespace)
			continue
		}
		if exact && rule.GetNamespace() == d.Namespace {
			here = true
			h.exportTo, _, _ = unstructured.NestedSlice(rule.Object, "spec", "exportTo")
			d.readSubsets(h, rule, stable)
			continue
		}
		// The most specific one applies: the namespace before the root namespace, then the longest name.
		rank := len(suffix)
		if exact {
			rank = 1 << 10
		}
		if rule.GetNamespace() == d.Namespace {
			rank += 1 << 20
		} else if rule.GetNamespace() != rootNamespace {
			continue
		}
		if rank > best {
			best, inherited = rank, rule
		}
	}
	if inherited != nil && !here {
		h.policy, _, _ = unstructured.NestedMap(inherited.Object, "spec", "trafficPolicy")
	}
}

// readSubsets reads the subsets that the Deployment's pods belong to.
func (d *driver) readSubsets(h *host, rule *unstructured.Unstructured, stable *appsv1.Deployment) {
	subsets, _, _ := unstructured.NestedSlice(rule.Object, "spec", "subsets")
	for _, item := range subsets {
		of, _ := item.(map[string]any)
		name, _ := of["name"].(string)
		selects, _, _ := unstructured.NestedStringMap(of, "labels")
		if labels.SelectorFromSet(selects).Matches(labels.Set(stable.Spec.Template.Labels)) {
			policy, _ := of["trafficPolicy"].(map[string]any)
			h.subsets[name] = subset{labels: selects, policy: policy}
		}
	}
}

// findRoutes finds the VirtualServices that lead to a host, and which hosts need one.
func (d *driver) findRoutes(ctx context.Context, r *routing) error {
	for _, h := range r.hosts {
		h.own = true
	}
	found, err := d.list(ctx, virtualServices)
	if err != nil {
		return err
	}
	to := r.leads(d.Namespace)
	used := map[*host]map[string]bool{}
	for _, vs := range found {
		if vs.GetLabels()[rolloutLabel] == d.Name && vs.GetNamespace() == d.Namespace {
			continue
		}
		ours := false
		if err := destinations(&vs, func(name, sub string) {
			if h := to(vs.GetNamespace(), name); h != nil {
				ours = true
				for _, prefix := range []string{stablePrefix, canaryPrefix} {
					if of, ok := unside(prefix, sub); ok {
						sub = of
					}
				}
				if used[h] == nil {
					used[h] = map[string]bool{}
				}
				used[h][sub] = true
			}
		}); err != nil {
			return err
		}
		if ours {
			r.others = append(r.others, vs)
		}
		gateways, _, _ := unstructured.NestedStringSlice(vs.Object, "spec", "gateways")
		if len(gateways) > 0 && !slices.Contains(gateways, "mesh") {
			continue
		}
		hosts, _, _ := unstructured.NestedStringSlice(vs.Object, "spec", "hosts")
		for _, name := range hosts {
			if h := to(vs.GetNamespace(), name); h != nil {
				h.own = false
			}
		}
	}
	for _, h := range r.hosts {
		if h.own {
			if slices.ContainsFunc(found, func(vs unstructured.Unstructured) bool {
				return vs.GetNamespace() == d.Namespace && vs.GetName() == ownName(h.service) && vs.GetLabels()[rolloutLabel] != d.Name
			}) {
				r.problem("virtualservice/%s -n %s exists: a rollout needs this name", ownName(h.service), d.Namespace)
			}
			if used[h] == nil {
				used[h] = map[string]bool{}
			}
			used[h][""] = true
		}
		// Subsets that no route names need no split.
		maps.DeleteFunc(h.subsets, func(name string, _ subset) bool { return !used[h][name] })
		if len(h.subsets) == 0 {
			r.problem("the routes to service/%s name subsets with labels that the pods of %s do not have", h.service, d.Name)
		}
	}
	return nil
}

// checkGatewayAPI returns an error if a route of Gateway API leads to a Service: its weights would not be set, so it would send
// requests to all pods of the Service.
func (d *driver) checkGatewayAPI(ctx context.Context, r *routing) error {
	for _, kind := range gatewayRoutes {
		routes, err := d.list(ctx, kind)
		if apierrors.IsNotFound(err) {
			continue // the cluster has no Gateway API
		}
		if err != nil {
			return err
		}
		for _, route := range routes {
			rules, _, _ := unstructured.NestedSlice(route.Object, "spec", "rules")
			for _, rule := range rules {
				refs, _, _ := unstructured.NestedSlice(rule.(map[string]any), "backendRefs")
				for _, ref := range refs {
					of, _ := ref.(map[string]any)
					namespace, _ := of["namespace"].(string)
					if namespace == "" {
						namespace = route.GetNamespace()
					}
					if name, _ := of["name"].(string); namespace == d.Namespace && slices.Contains(r.services(), name) {
						return fmt.Errorf("%s/%s -n %s leads to service/%s, and a rollout sets the weights of VirtualServices only: give it a VirtualService instead",
							strings.ToLower(route.GetKind()), route.GetName(), route.GetNamespace(), name)
					}
				}
			}
		}
	}
	return nil
}

// checkOtherPods returns an error if a Service has pods of other workloads and a route leads to all of them: only the pods of the
// rollout's two versions would remain in it.
func (d *driver) checkOtherPods(ctx context.Context, r *routing) error {
	for _, h := range r.hosts {
		if _, all := h.subsets[""]; !all {
			continue
		}
		service, err := d.Cluster.Client.CoreV1().Services(d.Namespace).Get(ctx, h.service, metav1.GetOptions{})
		if err != nil {
			return err
		}
		pods, err := d.Cluster.Client.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(service.Spec.Selector).String()})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if version := pod.Labels[d.state.VersionLabel]; version != d.state.Version && version != d.state.canaryMark() {
				return fmt.Errorf("service/%s has pods of another version, %s, such as pod %s: name a subset in each route to it, so that the rollout knows which requests are for %s",
					h.service, version, pod.Name, d.Name)
			}
		}
	}
	return nil
}

// applyRules applies the DestinationRules, which no route uses yet.
func (d *driver) applyRules(ctx context.Context, r *routing, owner metav1.OwnerReference) error {
	for _, h := range r.hosts {
		if len(h.subsets) == 0 {
			continue
		}
		if err := d.apply(ctx, destinationRules, h.destinationRule(d.state, owner)); err != nil {
			return err
		}
	}
	return nil
}

// apply applies one of the rollout's own objects.
func (d *driver) apply(ctx context.Context, kind schema.GroupVersionResource, u *unstructured.Unstructured) error {
	_, err := ssa.Apply(ctx, d.Cluster.Dynamic.Resource(kind).Namespace(u.GetNamespace()), u, ssa.Options{Manager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("apply %s/%s -n %s: %w", strings.ToLower(u.GetKind()), u.GetName(), u.GetNamespace(), err)
	}
	return nil
}

// weigh sets the canary's share in all routes. The user's VirtualServices are recorded first, so that they can be restored.
func (d *driver) weigh(ctx context.Context, r *routing, owner metav1.OwnerReference, weight int) error {
	var names []string
	for _, vs := range r.others {
		names = append(names, vs.GetNamespace()+"/"+vs.GetName())
	}
	slices.Sort(names)
	if err := d.save(ctx, func(s *State) { s.Routes = names }); err != nil {
		return err
	}
	to := r.leads(d.Namespace)
	for _, h := range r.hosts {
		if !h.own {
			continue
		}
		vs := h.virtualService(d.state, owner)
		if err := setWeight(vs, to, int64(weight)); err != nil {
			return err
		}
		if err := d.apply(ctx, virtualServices, vs); err != nil {
			return err
		}
	}
	for i := range r.others {
		if err := d.edit(ctx, &r.others[i], func(vs *unstructured.Unstructured) error { return setWeight(vs, to, int64(weight)) }); err != nil {
			return err
		}
	}
	return d.save(ctx, func(s *State) { s.Weight = weight })
}

// unweigh restores the user's routes, and removes the rollout's own.
func (d *driver) unweigh(ctx context.Context, stable *appsv1.Deployment, r *routing) error {
	for i := range r.others {
		if err := d.edit(ctx, &r.others[i], func(vs *unstructured.Unstructured) error { return removeWeights(vs, r.leads(d.Namespace)) }); err != nil {
			return err
		}
	}
	return d.removeOwn(ctx, stable, virtualServices)
}

// edit changes a VirtualService of the user, who may change it at the same time.
func (d *driver) edit(ctx context.Context, vs *unstructured.Unstructured, change func(*unstructured.Unstructured) error) error {
	resource := d.Cluster.Dynamic.Resource(virtualServices).Namespace(vs.GetNamespace())
	err := onConflict(ctx, func() error {
		live, err := resource.Get(ctx, vs.GetName(), metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := change(live); err != nil {
			return err
		}
		_, err = resource.Update(ctx, live, metav1.UpdateOptions{FieldManager: fieldManager})
		return err
	})
	if err != nil {
		return fmt.Errorf("set the weights of virtualservice/%s -n %s: %w", vs.GetName(), vs.GetNamespace(), err)
	}
	return nil
}

// removeOwn removes the objects of a kind that the rollout created.
func (d *driver) removeOwn(ctx context.Context, stable *appsv1.Deployment, kind schema.GroupVersionResource) error {
	resource := d.Cluster.Dynamic.Resource(kind).Namespace(d.Namespace)
	found, err := resource.List(ctx, metav1.ListOptions{LabelSelector: labels.Set{rolloutLabel: d.Name}.String()})
	if err != nil {
		return fmt.Errorf("list the %s of the rollout: %w", kind.Resource, err)
	}
	for _, u := range found.Items {
		uid := u.GetUID()
		if !d.owns(&u, stable) {
			continue
		}
		if err := resource.Delete(ctx, u.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove %s/%s: %w", strings.ToLower(u.GetKind()), u.GetName(), err)
		}
	}
	return nil
}
