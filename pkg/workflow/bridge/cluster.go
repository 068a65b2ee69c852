package bridge

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/ssa"
)

// Labels and annotations that the bridge writes on its own objects, and reads on Services of the mesh.
const (
	prefix         = "bridge.polymesh.dev/"
	managedByLabel = "app.kubernetes.io/managed-by"
	managedBy      = "polymesh-bridge"
	registryLabel  = prefix + "registry" // the bridge's name
	serviceLabel   = prefix + "service"

	nameAnnotation     = prefix + "name"     // of a ServiceEntry: the service in the registry
	instanceAnnotation = prefix + "instance" // of a WorkloadEntry: the instance in the registry
	heldAnnotation     = prefix + "held"     // of a WorkloadEntry: the bridge has hidden it from callers outside

	// On a Service of the mesh; its label is prefix plus the bridge's name.
	takesOverAnnotation = prefix + "takes-over"
	hostAnnotation      = prefix + "host"
	portAnnotation      = prefix + "port"
)

var (
	serviceEntries  = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"}
	workloadEntries = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "workloadentries"}
)

// fieldManager is the bridge's field manager for server-side apply.
func (o Options) fieldManager() string { return managedBy + "-" + o.Name }

// cluster is the client for the mesh's side.
type cluster struct {
	core         kubernetes.Interface
	dynamic      dynamic.Interface
	id           string // identifies this cluster
	fieldManager string
}

func connect(ctx context.Context, o Options) (*cluster, error) {
	c := &cluster{fieldManager: o.fieldManager()}
	var err error
	if c.core, err = kubernetes.NewForConfig(o.REST); err != nil {
		return nil, err
	}
	if c.dynamic, err = dynamic.NewForConfig(o.REST); err != nil {
		return nil, err
	}
	system, err := c.core.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return nil, kubeconfig.Unreachable(o.REST.Host, err)
	}
	c.id = string(system.UID)
	if _, err := c.dynamic.Resource(serviceEntries).List(ctx, metav1.ListOptions{Limit: 1}); err != nil {
		if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
			return nil, fmt.Errorf("the cluster at %s has no Istio: it has no ServiceEntry resource", o.REST.Host)
		}
		return nil, fmt.Errorf("read ServiceEntries: %w", err)
	}
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Namespace}}
	_, err = c.core.CoreV1().Namespaces().Get(ctx, o.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = c.core.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{FieldManager: c.fieldManager})
	}
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("create namespace %s: %w", o.Namespace, err)
	}
	return c, nil
}

// view is the state of the mesh in one pass.
type view struct {
	name, manager string
	entries       []*unstructured.Unstructured // all ServiceEntries
	workloads     []*unstructured.Unstructured // WorkloadEntries in the bridge's namespace
	own           []ownRange                   // addresses of the cluster itself
	offers        []offer
}

// offer is a Service of the mesh that is to be in the registry.
type offer struct {
	service   types.NamespacedName
	name      string // in the registry
	takesOver bool
	advert    Advert
	problem   string // the reason if there is no advert
}

// read reads the mesh's side in each pass: that is cheap, and decisions never use an outdated view.
func (c *cluster) read(ctx context.Context, o Options) (view, error) {
	v := view{name: o.Name, manager: c.fieldManager}
	entries, err := c.dynamic.Resource(serviceEntries).List(ctx, metav1.ListOptions{})
	if err != nil {
		return v, fmt.Errorf("list ServiceEntries: %w", err)
	}
	workloads, err := c.dynamic.Resource(workloadEntries).Namespace(o.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return v, fmt.Errorf("list WorkloadEntries of %s: %w", o.Namespace, err)
	}
	for i := range entries.Items {
		entries.Items[i].SetGroupVersionKind(serviceEntries.GroupVersion().WithKind("ServiceEntry"))
		v.entries = append(v.entries, &entries.Items[i])
	}
	for i := range workloads.Items {
		workloads.Items[i].SetGroupVersionKind(workloadEntries.GroupVersion().WithKind("WorkloadEntry"))
		v.workloads = append(v.workloads, &workloads.Items[i])
	}
	if v.own, err = c.ownRanges(ctx); err != nil {
		return v, err
	}
	services, err := c.core.CoreV1().Services("").List(ctx, metav1.ListOptions{LabelSelector: prefix + o.Name})
	if err != nil {
		return v, fmt.Errorf("list Services: %w", err)
	}
	if len(services.Items) == 0 {
		return v, nil
	}
	gateway, err := c.core.CoreV1().Services(o.Gateway.Namespace).Get(ctx, o.Gateway.Name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return v, fmt.Errorf("read the gateway's Service: %w", err)
	}
	if apierrors.IsNotFound(err) {
		gateway = nil
	}
	// Older Services first: the first one keeps a name.
	slices.SortFunc(services.Items, func(a, b corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	for i := range services.Items {
		if services.Items[i].DeletionTimestamp == nil {
			v.offers = append(v.offers, o.offer(&services.Items[i], gateway, c.id))
		}
	}
	return v, nil
}

// offer reads a Service's labels and annotations. Callers outside reach it at its own address if it has one, and otherwise
// through the gateway.
func (o Options) offer(svc, gateway *corev1.Service, cluster string) offer {
	f := offer{
		service:   types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name},
		name:      svc.Labels[prefix+o.Name],
		takesOver: svc.Annotations[takesOverAnnotation] == "true",
	}
	if f.name == "" || f.name == "true" {
		f.name = svc.Name
	}
	way, port := svc, int32(0)
	if len(svc.Spec.Ports) > 0 {
		port = svc.Spec.Ports[0].Port
	}
	address := loadBalancerAddress(svc)
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		way, port, address = gateway, 0, ""
		if gateway != nil {
			port, address = gatewayPort(gateway), loadBalancerAddress(gateway)
		}
		host, number, _ := splitAddress(o.AdvertiseAddress)
		address = cmp.Or(host, address)
		port = cmp.Or(int32(number), port, 80)
	}
	if text := svc.Annotations[portAnnotation]; text != "" {
		number, err := strconv.ParseUint(text, 10, 16)
		if err != nil || number == 0 {
			f.problem = fmt.Sprintf("the annotation %s is %q, not a port", portAnnotation, text)
			return f
		}
		port = int32(number)
	}
	switch {
	case address == "" && way == nil:
		f.problem = fmt.Sprintf("gateway %s does not exist: set its Service with --gateway, or its address with --advertise-address", o.Gateway)
		return f
	case address == "":
		f.problem = fmt.Sprintf("Service %s/%s has no external address yet", way.Namespace, way.Name)
		return f
	case port == 0:
		f.problem = "it has no port"
		return f
	}
	f.advert = Advert{
		Service: f.name, ID: fmt.Sprintf(IDPrefix+"%.8s:%s:%s", cluster, svc.Namespace, svc.Name),
		Host: address, Address: address, Port: int(port), Owner: cluster + "/" + o.Namespace + "/" + o.Name,
	}
	switch host := svc.Annotations[hostAnnotation]; {
	case host != "" && net.ParseIP(host) == nil && len(validation.IsDNS1123Subdomain(strings.ToLower(host))) > 0:
		f.problem = fmt.Sprintf("the annotation %s is %q, neither a host name nor an address", hostAnnotation, short(host))
	case host != "":
		f.advert.Host = host
	case o.AdvertiseDomain != "" && svc.Spec.Type != corev1.ServiceTypeLoadBalancer:
		if l, err := label(f.name); err == nil {
			f.advert.Host = l + "." + o.AdvertiseDomain
		}
	}
	return f
}

func loadBalancerAddress(svc *corev1.Service) string {
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if a := cmp.Or(in.IP, in.Hostname); a != "" {
			return a
		}
	}
	return ""
}

// gatewayPort returns a gateway's port for plain HTTP, as named in Istio's charts.
func gatewayPort(gateway *corev1.Service) int32 {
	for _, p := range gateway.Spec.Ports {
		if p.Name == "http2" || p.Name == "http" || p.Port == 80 {
			return p.Port
		}
	}
	return 0
}

// ours reports whether the object was written by a bridge of this name. A user's copy may have the same label.
func (v view) ours(o *unstructured.Unstructured) bool {
	return o.GetLabels()[registryLabel] == v.name && ssa.AppliedBy(o, v.manager)
}

// taken describes the other owner of a name in the mesh, if any. A name that the bridge has written stays the bridge's.
func (v view) taken(o Options, n *name) string {
	if n.entry != nil {
		return ""
	}
	host := o.host(n.label)
	for _, e := range v.entries {
		if v.ours(e) {
			continue
		}
		if e.GetNamespace() == o.Namespace && e.GetName() == host {
			return fmt.Sprintf("the name of a foreign ServiceEntry in %s", e.GetNamespace())
		}
		exported, found, _ := unstructured.NestedStringSlice(e.Object, "spec", "exportTo")
		if found && slices.Equal(exported, []string{"."}) && e.GetNamespace() != o.Namespace {
			continue // not visible in other namespaces
		}
		hosts, _, _ := unstructured.NestedStringSlice(e.Object, "spec", "hosts")
		if slices.Contains(hosts, host) {
			return fmt.Sprintf("a host of ServiceEntry %s/%s", e.GetNamespace(), e.GetName())
		}
	}
	return ""
}

// same reports whether an object is up to date. Only fields that the bridge writes are compared.
func same(want, have *unstructured.Unstructured) bool {
	if have == nil || !equality.Semantic.DeepEqual(want.Object["spec"], have.Object["spec"]) {
		return false
	}
	labels, own := have.GetLabels(), have.GetAnnotations()
	for k, v := range want.GetLabels() {
		if labels[k] != v {
			return false
		}
	}
	maps.DeleteFunc(own, func(k, _ string) bool { return !strings.HasPrefix(k, prefix) })
	return maps.Equal(want.GetAnnotations(), own)
}

func (c *cluster) resource(o *unstructured.Unstructured) dynamic.ResourceInterface {
	r := serviceEntries
	if o.GetKind() == "WorkloadEntry" {
		r = workloadEntries
	}
	return c.dynamic.Resource(r).Namespace(o.GetNamespace())
}

func (c *cluster) apply(ctx context.Context, o *unstructured.Unstructured) error {
	if _, err := ssa.Apply(ctx, c.resource(o), o, ssa.Options{Manager: c.fieldManager, Force: true}); err != nil {
		return fmt.Errorf("write %s: %w", id(o), err)
	}
	return nil
}

// remove deletes an object, if it has not been replaced since it was read.
func (c *cluster) remove(ctx context.Context, o *unstructured.Unstructured) error {
	uid := o.GetUID()
	err := c.resource(o).Delete(ctx, o.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", id(o), err)
	}
	return nil
}

func id(o *unstructured.Unstructured) string {
	return o.GetKind() + " " + o.GetNamespace() + "/" + o.GetName()
}

// joinPort supports both address families.
func joinPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
