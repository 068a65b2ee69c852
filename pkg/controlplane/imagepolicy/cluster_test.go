//go:build integration

package imagepolicy

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	applyv1 "k8s.io/client-go/applyconfigurations/admissionregistration/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// The component lives its whole life with its own identity, which may do nothing else.
func TestOwnIdentity(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	admins := controlplanetest.Start(t, log)
	cred := filepath.Dir(admins)
	own := filepath.Join(cred, "image-policy.kubeconfig")
	if info, err := os.Stat(own); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its kubeconfig: %v %v", info, err)
	}
	admin, ctx := controlplanetest.Client(t, admins), t.Context()

	s := newSetup(t)
	p, node := s.policy, s.policy.node
	p.opts.Kubeconfig, p.opts.Log = own, log
	p.opts.Certificates = certificate.Store(filepath.Join(filepath.Dir(cred), "tls"))
	p.opts.Open = func() (Node, error) { return node, nil }
	start := func(p *Policy) {
		t.Helper()
		if err := p.Start(ctx); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "the component is ready", func() error { return p.Ready(ctx) })
	}
	start(p)
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := p.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)

	const shop = "shop"
	if _, err := admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: shop, Labels: map[string]string{Label: Enforce}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.CoreV1().Secrets(shop).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"registry.example":{"username":"a","password":"b"}}}`)}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	try := func(image string) (*corev1.Pod, error) {
		x := pod("", image, "", "")
		x.Name, x.GenerateName = "", "x-"
		x.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
		return admin.CoreV1().Pods(shop).Create(ctx, x, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	}
	signed := s.repo + "api:signed"
	refuses := func() {
		t.Helper()
		controlplanetest.Eventually(t, "an unsigned image is refused", func() error {
			_, err := try(s.repo + "api:unsigned")
			if apierrors.IsForbidden(err) && strings.Contains(err.Error(), "is not signed by a key of this server") {
				return nil
			}
			return fmt.Errorf("%v", err)
		})
	}
	refuses()
	controlplanetest.Eventually(t, "a signed image is taken, and the pull secret read", func() error {
		x, err := try(signed)
		if err != nil {
			return err
		}
		if want := signed + "@" + s.sums["api:signed"].String(); x.Spec.Containers[0].Image != want {
			return fmt.Errorf("image %s, want %s", x.Spec.Containers[0].Image, want)
		}
		return nil
	})

	hooks := admin.AdmissionregistrationV1()
	if err := hooks.ValidatingWebhookConfigurations().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	changed, err := hooks.MutatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ignore := admissionv1.Ignore
	changed.Webhooks[0].FailurePolicy = &ignore
	if _, err := hooks.MutatingWebhookConfigurations().Update(ctx, changed, metav1.UpdateOptions{FieldManager: "someone"}); err != nil {
		t.Fatal(err)
	}
	p.loop.Kick()
	controlplanetest.Eventually(t, "both webhooks are put back", func() error {
		if _, err := hooks.ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		m, err := hooks.MutatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
		if err == nil && *m.Webhooks[0].FailurePolicy != admissionv1.Fail {
			err = fmt.Errorf("failure policy %s", *m.Webhooks[0].FailurePolicy)
		}
		return err
	})
	refuses()
	stop()

	// An earlier version wrote both under another name, which is taken over by a patch.
	if err := hooks.ValidatingWebhookConfigurations().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := hooks.ValidatingWebhookConfigurations().Apply(ctx, applyv1.ValidatingWebhookConfiguration(name), metav1.ApplyOptions{FieldManager: "polymesh"}); err != nil {
		t.Fatal(err)
	}
	again := New(p.opts)
	if err := again.Init(ctx); err != nil {
		t.Fatal(err)
	}
	start(again)
	if v, err := hooks.ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); err != nil || len(v.ManagedFields) != 1 || v.ManagedFields[0].Manager != fieldManager {
		t.Errorf("after another version: %v %v", v, err)
	}
	if err := again.Stop(ctx); err != nil {
		t.Error(err)
	}

	opts := p.opts
	opts.Keys = nil
	without := New(opts)
	if err := without.Init(ctx); err != nil {
		t.Fatal(err)
	}
	start(without)
	if err := without.Stop(ctx); err != nil {
		t.Error(err)
	}
	if _, err := hooks.ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("without keys the validating webhook stays: %v", err)
	}
	if _, err := hooks.MutatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("without keys the mutating webhook stays: %v", err)
	}

	// Of several servers one has no keys: the policy stays, until none has.
	opts = p.opts
	opts.Server, opts.Several = "one", true
	one := New(opts)
	opts.Server, opts.Keys = "two", nil
	two := New(opts)
	for _, server := range []*Policy{one, two} {
		if err := server.Init(ctx); err != nil {
			t.Fatal(err)
		}
	}
	start(one)
	if err := two.Start(ctx); err != nil {
		t.Fatal(err)
	}
	says := func(p *Policy, text string) {
		t.Helper()
		controlplanetest.Eventually(t, text, func() error {
			p.loop.Kick()
			if err := p.Ready(ctx); err == nil || !strings.Contains(err.Error(), text) {
				return fmt.Errorf("it says %v", err)
			}
			return nil
		})
	}
	says(two, `server "one" has an image policy and this one has no key`)
	refuses()
	annotate := func(value string) {
		t.Helper()
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%s}}}`, recordName("three"), value)
		if _, err := hooks.ValidatingWebhookConfigurations().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	annotate(`"{\"server\":\"three\",\"keys\":\"0\"}"`)
	says(one, `server "three" has other keys`)
	annotate("null")
	controlplanetest.Eventually(t, "the same keys again", func() error { one.loop.Kick(); return one.Ready(ctx) })
	if err := one.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	says(two, `server "one" has an image policy`) // it is only stopped
	opts.Server = "one"
	one = New(opts)
	if err := one.Init(ctx); err != nil {
		t.Fatal(err)
	}
	if err := one.Start(ctx); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "no server has keys", func() error {
		one.loop.Kick()
		two.loop.Kick()
		if _, err := hooks.ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the validating webhook: %v", err)
		}
		if _, err := hooks.MutatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the mutating webhook: %v", err)
		}
		return nil
	})
	for _, server := range []*Policy{one, two} {
		if err := server.Stop(ctx); err != nil {
			t.Error(err)
		}
	}

	other, err := hooks.ValidatingWebhookConfigurations().Create(ctx, &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "another"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	self := controlplanetest.Client(t, own)
	for what, f := range map[string]func() error{
		"get pods": func() error {
			_, err := self.CoreV1().Pods(shop).Get(ctx, "x", metav1.GetOptions{})
			return err
		},
		"list secrets": func() error {
			_, err := self.CoreV1().Secrets(shop).List(ctx, metav1.ListOptions{})
			return err
		},
		"delete secrets": func() error { return self.CoreV1().Secrets(shop).Delete(ctx, "pull", metav1.DeleteOptions{}) },
		"create clusterrolebindings": func() error {
			_, err := self.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "mine"},
				RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"}}, metav1.CreateOptions{})
			return err
		},
		"create another webhook": func() error {
			_, err := self.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, &admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "mine"}}, metav1.CreateOptions{})
			return err
		},
		"apply another webhook": func() error {
			_, err := self.AdmissionregistrationV1().MutatingWebhookConfigurations().Apply(ctx, applyv1.MutatingWebhookConfiguration("mine"), metav1.ApplyOptions{FieldManager: fieldManager})
			return err
		},
		"update another webhook": func() error {
			_, err := self.AdmissionregistrationV1().ValidatingWebhookConfigurations().Update(ctx, other, metav1.UpdateOptions{})
			return err
		},
		"delete another webhook": func() error {
			return self.AdmissionregistrationV1().ValidatingWebhookConfigurations().Delete(ctx, other.Name, metav1.DeleteOptions{})
		},
	} {
		if err := f(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want it forbidden", what, err)
		}
	}
}
