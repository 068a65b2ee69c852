package controlplane

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"

	"polymesh.dev/polymesh/pkg/certificate"
)

// rolesTimeout bounds each request for a role: upstream's library takes no context.
const rolesTimeout = 10 * time.Second

// clusterRoles are the rights of the server's components that upstream has no role for. Each has what its component asks
// the API server for and nothing else; a test runs the component with it.
func clusterRoles() []rbacv1.ClusterRole {
	const webhooks = "polymesh-image-policy" // as pkg/controlplane/imagepolicy names both
	return []rbacv1.ClusterRole{
		{ObjectMeta: defaults(certificate.ImagePolicyUser), Rules: []rbacv1.PolicyRule{
			// A create cannot be restricted by name, unless it comes from a server-side apply: that has a name to ask for
			// (createAuthorizerAttributes in k8s.io/apiserver, pkg/endpoints/handlers/patch.go). So no other webhook can be made.
			{
				APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"validatingwebhookconfigurations", "mutatingwebhookconfigurations"},
				ResourceNames: []string{webhooks}, Verbs: []string{"get", "create", "patch", "delete"},
			},
			// The pull secrets of the pods that it is asked about: which Secrets these are only the pods say, and any namespace
			// may ask for the policy. It cannot list them.
			{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get"}},
		}},
		{ObjectMeta: defaults(certificate.LoadBalancerUser), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{""}, Resources: []string{"services/status"}, Verbs: []string{"patch"}},
			// What client-go's recorder does (recordEvent in k8s.io/client-go, tools/record/event.go).
			{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
		}},
		// For kube-system alone: see roleBindings. A create cannot be restricted by name.
		{ObjectMeta: defaults(certificate.NodeResyncUser), Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list", "create", "delete"}},
		}},
	}
}

// roleBindings give roles in one namespace only.
func roleBindings() []rbacv1.RoleBinding {
	resync := rbacv1.RoleBinding{
		ObjectMeta: defaults(certificate.NodeResyncUser),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: certificate.NodeResyncUser},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: certificate.NodeResyncUser}},
	}
	resync.Namespace = metav1.NamespaceSystem
	return []rbacv1.RoleBinding{resync}
}

// clusterRoleBindings give the roles to the users of the certificates. The API server's identity at the kubelet gets the
// role that upstream has for it and binds for no one, because the name is the installer's choice
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#other-component-roles).
func clusterRoleBindings() []rbacv1.ClusterRoleBinding {
	bind := func(name, role, user string) rbacv1.ClusterRoleBinding {
		return rbacv1.ClusterRoleBinding{
			ObjectMeta: defaults(name),
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
		}
	}
	return []rbacv1.ClusterRoleBinding{
		bind("system:polymesh:kube-apiserver-kubelet-client", "system:kubelet-api-admin", certificate.APIServerKubeletUser),
		bind(certificate.ImagePolicyUser, certificate.ImagePolicyUser, certificate.ImagePolicyUser),
		bind(certificate.LoadBalancerUser, certificate.LoadBalancerUser, certificate.LoadBalancerUser),
	}
}

// defaults is the metadata that upstream gives its own bootstrap policy.
func defaults(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Labels: maps.Clone(bootstrappolicy.Label), Annotations: maps.Clone(bootstrappolicy.Annotation)}
}

// reconcileRoles makes what is missing of the roles and bindings, as the API server does at each start with its bootstrap
// policy (ensureRBACPolicy in pkg/registry/rbac/rest/storage_rbac.go): rules and subjects that were added stay, those that
// were removed come back, unless the object says rbac.authorization.kubernetes.io/autoupdate: "false"
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#auto-reconciliation). It does as much as it can.
func reconcileRoles(ctx context.Context, client kubernetes.Interface) error {
	var errs []error
	for _, role := range clusterRoles() {
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
	for _, binding := range clusterRoleBindings() {
		errs = append(errs, reconcile(ctx, "ClusterRoleBinding", binding.Name, func() (reconciliation.ReconcileOperation, bool, error) {
			o := reconciliation.ReconcileRoleBindingOptions{
				RoleBinding: reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &binding},
				Client:      reconciliation.ClusterRoleBindingClientAdapter{Client: client.RbacV1().ClusterRoleBindings()}, Confirm: true,
			}
			result, err := o.Run()
			if err != nil {
				return "", false, err
			}
			return result.Operation, result.Protected, nil
		}))
	}
	for _, binding := range roleBindings() {
		errs = append(errs, reconcile(ctx, "RoleBinding", binding.Name, func() (reconciliation.ReconcileOperation, bool, error) {
			o := reconciliation.ReconcileRoleBindingOptions{
				RoleBinding: reconciliation.RoleBindingAdapter{RoleBinding: &binding},
				Client:      reconciliation.RoleBindingClientAdapter{Client: client.RbacV1(), NamespaceClient: client.CoreV1().Namespaces()}, Confirm: true,
			}
			result, err := o.Run()
			if err != nil {
				return "", false, err
			}
			return result.Operation, result.Protected, nil
		}))
	}
	return errors.Join(errs...)
}

// reconcile runs one reconciliation, again while others write the same object, and logs what it has done.
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
		return fmt.Errorf("put %s %s in place: %w: delete the configuration of this webhook, which covers Kubernetes' own roles, with the administrator's kubeconfig", kind, name, err)
	case err != nil:
		return fmt.Errorf("put %s %s in place: %w", kind, name, err)
	case did == reconciliation.ReconcileNone:
	case protected:
		klog.Warningf("%s %s is not as this version needs it, and stays so: its annotation %s is \"false\"", kind, name, rbacv1.AutoUpdateAnnotationKey)
	default:
		klog.Infof("%s %s: %s", kind, name, did)
	}
	return nil
}
