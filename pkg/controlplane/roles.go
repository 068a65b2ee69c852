package controlplane

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
)

// Roles of machines that join, and of nodes.
const (
	agentJoinRole = "system:polymesh:agent-join"
	// Its holders are administrators of the cluster: they get its authorities.
	serverJoinRole = "system:polymesh:server-join"
	memberRole     = "system:polymesh:member"
	// observeSendRole is for what each node reads of itself for the store of metrics, logs and traces.
	observeSendRole = "system:polymesh:observe-send"
)

// podNetwork is the role of pkg/node/network, which acts with the node's own identity.
const podNetwork = "system:polymesh:pod-network"

// rolesTimeout limits each request for a role: upstream's library takes no context.
const rolesTimeout = 10 * time.Second

// clusterRoles are the permissions of server components for which upstream has no role. Each contains exactly what its component
// requests from the API server; a test runs the component with it.
func clusterRoles() []rbacv1.ClusterRole {
	const webhooks = "polymesh-image-policy" // the name of both in pkg/controlplane/imagepolicy
	return []rbacv1.ClusterRole{
		{ObjectMeta: defaults(certificate.ImagePolicyUser), Rules: []rbacv1.PolicyRule{
			// A create cannot be restricted by name, except by server-side apply, whose requests contain the name
			// (createAuthorizerAttributes in k8s.io/apiserver, pkg/endpoints/handlers/patch.go). So no other webhook can be created.
			{
				APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"validatingwebhookconfigurations", "mutatingwebhookconfigurations"},
				ResourceNames: []string{webhooks}, Verbs: []string{"get", "create", "patch", "delete"},
			},
			// The pull secrets of the pods under review: pods can reference any Secret, and any namespace can enable the policy.
			// The role cannot list them.
			{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get"}},
		}},
		{ObjectMeta: defaults(certificate.LoadBalancerUser), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"nodes", "services"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{""}, Resources: []string{"services/status"}, Verbs: []string{"patch"}},
			// Used by client-go's recorder (recordEvent in k8s.io/client-go, tools/record/event.go).
			{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
		}},
		{ObjectMeta: defaults(agentJoinRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{join.AgentPath}, Verbs: []string{"post"}},
		}},
		{ObjectMeta: defaults(serverJoinRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{join.ServerPath}, Verbs: []string{"post"}},
		}},
		{ObjectMeta: defaults(memberRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{join.ClusterPath}, Verbs: []string{"get"}},
			{NonResourceURLs: []string{join.LeavePath, join.ReachPath}, Verbs: []string{"post"}},
		}},
		// Bound to no one: for users that deploy and are not administrators of the cluster.
		{ObjectMeta: defaults(imagestore.PushRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{imagestore.BuildsPath + "*"}, Verbs: []string{"get", "head", "post", "patch", "put"}},
		}},
		// A node reads the other nodes' addresses and pod ranges. Its own status it may patch anyway (Node authorizer).
		{ObjectMeta: defaults(podNetwork), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"list", "watch"}},
		}},
		// Every node enforces NetworkPolicies for its pods, whose peers can be any pods. Upstream's authorizer of nodes allows none of
		// this, and RBAC adds to it.
		{ObjectMeta: defaults(networkPolicyRole), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{""}, Resources: []string{"namespaces", "pods"}, Verbs: []string{"list", "watch"}},
		}},
		// Only for default: see roleBindings. The list of API servers, for each node's balancer (pkg/node/apilb).
		{ObjectMeta: defaults(apiBalancerRole), Rules: []rbacv1.PolicyRule{{
			APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, ResourceNames: []string{"kubernetes"},
			Verbs: []string{"get", "list", "watch"},
		}}},
	}
}

// observeRoles are those of a cluster with a store of metrics, logs and traces.
func observeRoles() []rbacv1.ClusterRole {
	follow := []string{"list", "watch"}
	return []rbacv1.ClusterRole{
		// The store shows objects, but no Secrets. Of ConfigMaps it requests only labelled ones, which RBAC cannot express.
		{ObjectMeta: defaults(certificate.ObserveUser), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Verbs: follow, Resources: []string{"configmaps", "namespaces", "nodes", "persistentvolumeclaims", "pods", "services"}},
			{APIGroups: []string{"apps"}, Verbs: follow, Resources: []string{"daemonsets", "deployments", "replicasets", "statefulsets"}},
			{APIGroups: []string{"autoscaling"}, Verbs: follow, Resources: []string{"horizontalpodautoscalers"}},
			{APIGroups: []string{"batch"}, Verbs: follow, Resources: []string{"cronjobs", "jobs"}},
			// It also reports errors in users' configuration as events.
			{APIGroups: []string{"events.k8s.io"}, Verbs: []string{"list", "watch", "create"}, Resources: []string{"events"}},
			// Besides, what Prometheus discovers for users' scrape jobs.
			{APIGroups: []string{""}, Verbs: follow, Resources: []string{"endpoints"}},
			{APIGroups: []string{discoveryv1.GroupName}, Verbs: follow, Resources: []string{"endpointslices"}},
			{APIGroups: []string{"networking.k8s.io"}, Verbs: follow, Resources: []string{"ingresses"}},
			// What kubelets authorize as (https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/).
			{APIGroups: []string{""}, Verbs: []string{"get"}, Resources: []string{"nodes/metrics"}},
		}},
		// Bound to no one: for users that see the metrics, logs and traces of all namespaces and are not administrators of the cluster.
		{ObjectMeta: defaults(layout.ObserveRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{layout.ObservePath + "*"}, Verbs: []string{"get"}},
		}},
		// Of which node something is, is the handler's to say (pkg/observe/route).
		{ObjectMeta: defaults(observeSendRole), Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{layout.ObserveIngestPath}, Verbs: []string{"get", "post"}},
		}},
	}
}

// networkPolicyRole is the role of all nodes for pkg/node/netpol.
const networkPolicyRole = "system:polymesh:network-policy"

// apiBalancerRole is bound to the group of all nodes.
const apiBalancerRole = "system:polymesh:api-balancer"

// roleBindings bind roles in a single namespace.
func roleBindings() []rbacv1.RoleBinding {
	balancer := rbacv1.RoleBinding{
		ObjectMeta: defaults(apiBalancerRole),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: apiBalancerRole},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: user.NodesGroup}},
	}
	balancer.Namespace = metav1.NamespaceDefault
	return []rbacv1.RoleBinding{balancer}
}

// bind binds a role to a user or a group.
func bind(kind, name, role, subject string) rbacv1.ClusterRoleBinding {
	return rbacv1.ClusterRoleBinding{
		ObjectMeta: defaults(name),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: kind, Name: subject}},
	}
}

func bindUser(name, role, user string) rbacv1.ClusterRoleBinding {
	return bind(rbacv1.UserKind, name, role, user)
}

func bindGroup(name, role, group string) rbacv1.ClusterRoleBinding {
	return bind(rbacv1.GroupKind, name, role, group)
}

// observeRoleBindings are those of observeRoles.
func observeRoleBindings() []rbacv1.ClusterRoleBinding {
	return []rbacv1.ClusterRoleBinding{
		bindUser(certificate.ObserveUser, certificate.ObserveUser, certificate.ObserveUser),
		bindGroup(observeSendRole, observeSendRole, user.NodesGroup),
	}
}

// clusterRoleBindings bind the roles to the users of the certificates, and one to all nodes. The API server's kubelet client uses
// upstream's role, which upstream binds to no one, because the user name is the installer's choice
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#other-component-roles).
func clusterRoleBindings() []rbacv1.ClusterRoleBinding {
	return []rbacv1.ClusterRoleBinding{
		bindUser("system:polymesh:kube-apiserver-kubelet-client", "system:kubelet-api-admin", certificate.APIServerKubeletUser),
		bindUser(certificate.ImagePolicyUser, certificate.ImagePolicyUser, certificate.ImagePolicyUser),
		bindUser(certificate.LoadBalancerUser, certificate.LoadBalancerUser, certificate.LoadBalancerUser),
		bindGroup(agentJoinRole, agentJoinRole, join.AgentGroup),
		bindGroup(serverJoinRole, serverJoinRole, join.ServerGroup),
		// A node has one identity, which its proxy uses too. kube-controller-manager approves that it renews its client certificate.
		bindGroup(memberRole, memberRole, user.NodesGroup),
		bindGroup("system:polymesh:node-proxier", "system:node-proxier", user.NodesGroup),
		bindGroup("system:polymesh:node-client-renewal", "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", user.NodesGroup),
		bindGroup(podNetwork, podNetwork, user.NodesGroup),
		bindGroup(networkPolicyRole, networkPolicyRole, user.NodesGroup),
	}
}

// defaults is the metadata of upstream's own bootstrap policy.
func defaults(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Labels: maps.Clone(bootstrappolicy.Label), Annotations: maps.Clone(bootstrappolicy.Annotation)}
}

// reconcileRoles adds missing parts of the roles and bindings, as the API server does at each start with its bootstrap
// policy (ensureRBACPolicy in pkg/registry/rbac/rest/storage_rbac.go): added rules and subjects stay, removed ones
// are restored, unless the object has rbac.authorization.kubernetes.io/autoupdate: "false"
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#auto-reconciliation). Without a store, its roles are removed. After an
// error it continues with the rest.
func reconcileRoles(ctx context.Context, client kubernetes.Interface, observe bool) error {
	var errs []error
	roles, bindings := clusterRoles(), clusterRoleBindings()
	if observe {
		roles, bindings = append(roles, observeRoles()...), append(bindings, observeRoleBindings()...)
	} else {
		errs = append(errs, removeObserveRoles(ctx, client))
	}
	for _, role := range roles {
		errs = append(errs, reconcile(ctx, "ClusterRole", role.Name, func() (reconciliation.ReconcileOperation, bool, error) {
			o := reconciliation.ReconcileRoleOptions{
				Role: reconciliation.ClusterRoleRuleOwner{ClusterRole: &role}, Client: reconciliation.ClusterRoleModifier{Client: client.RbacV1().ClusterRoles()}, Confirm: true,
			}
			result, err := o.Run()
			if err != nil {
				return "", false, err
			}
			return result.Operation, result.Protected, nil
		}))
	}
	bind := func(kind, name string, binding reconciliation.RoleBinding, client reconciliation.RoleBindingModifier) {
		errs = append(errs, reconcile(ctx, kind, name, func() (reconciliation.ReconcileOperation, bool, error) {
			o := reconciliation.ReconcileRoleBindingOptions{RoleBinding: binding, Client: client, Confirm: true}
			result, err := o.Run()
			if err != nil {
				return "", false, err
			}
			return result.Operation, result.Protected, nil
		}))
	}
	for _, binding := range bindings {
		bind("ClusterRoleBinding", binding.Name, reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &binding},
			reconciliation.ClusterRoleBindingClientAdapter{Client: client.RbacV1().ClusterRoleBindings()})
	}
	for _, binding := range roleBindings() {
		bind("RoleBinding", binding.Name, reconciliation.RoleBindingAdapter{RoleBinding: &binding},
			reconciliation.RoleBindingClientAdapter{Client: client.RbacV1(), NamespaceClient: client.CoreV1().Namespaces()})
	}
	return errors.Join(errs...)
}

// removeObserveRoles removes what an earlier start with a store has made, unless a user has told to leave it as it is.
func removeObserveRoles(ctx context.Context, client kubernetes.Interface) error {
	var errs []error
	for _, binding := range observeRoleBindings() {
		errs = append(errs, remove(ctx, "ClusterRoleBinding", binding.Name, client.RbacV1().ClusterRoleBindings()))
	}
	for _, role := range observeRoles() {
		errs = append(errs, remove(ctx, "ClusterRole", role.Name, client.RbacV1().ClusterRoles()))
	}
	return errors.Join(errs...)
}

// remove deletes a role or a binding, if it is there and the server may change it.
func remove[T metav1.Object](ctx context.Context, kind, name string, of interface {
	Get(context.Context, string, metav1.GetOptions) (T, error)
	Delete(context.Context, string, metav1.DeleteOptions) error
}) error {
	ctx, cancel := context.WithTimeout(ctx, rolesTimeout)
	defer cancel()
	live, err := of.Get(ctx, name, metav1.GetOptions{})
	if err == nil && live.GetAnnotations()[rbacv1.AutoUpdateAnnotationKey] != "false" {
		uid := live.GetUID()
		if err = of.Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}); err == nil {
			klog.Infof("%s %s: removed, there is no store", kind, name)
		}
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove %s %s: %w", kind, name, err)
	}
	return nil
}

// reconcile runs one reconciliation, retries on conflicts, and logs the result.
func reconcile(ctx context.Context, kind, name string, run func() (reconciliation.ReconcileOperation, bool, error)) error {
	var did reconciliation.ReconcileOperation
	var protected bool
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() (err error) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		did, protected, err = run()
		return err
	})
	switch {
	case apierrors.IsInternalError(err) && strings.Contains(err.Error(), "webhook"):
		return fmt.Errorf("reconcile %s %s: %w: delete the configuration of this webhook, which covers Kubernetes' own roles, with the administrator's kubeconfig", kind, name, err)
	case err != nil:
		return fmt.Errorf("reconcile %s %s: %w", kind, name, err)
	case did == reconciliation.ReconcileNone:
	case protected:
		klog.Warningf("%s %s lacks permissions that this version needs and is not updated, because its annotation %s is \"false\"", kind, name, rbacv1.AutoUpdateAnnotationKey)
	default:
		klog.Infof("%s %s: %s", kind, name, did)
	}
	return nil
}
