//go:build integration

package addon

import (
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/config"
)

// The admission policies of the add-ons, on a real API server.
func testPolicies(t *testing.T, kubeconfig string, log *slog.Logger) {
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	rest.QPS, rest.Burst = 100, 200
	client := kubernetes.NewForConfigOrDie(rest)
	ctx := t.Context()

	start := func(opts Options) *Addon {
		t.Helper()
		opts.Kubeconfig, opts.Log = kubeconfig, log
		a := New(opts)
		if err := a.Init(ctx); err != nil {
			t.Fatal(err)
		}
		if err := a.Start(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Stop(t.Context()) })
		return a
	}
	eventually := func(what string, condition func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not after a minute: " + what)
			}
		}
	}

	t.Run("local-storage", func(t *testing.T) {
		opts := testOptions(config.LocalStorage)
		opts.StorageDir = filepath.Join(t.TempDir(), `poly "mesh"`, "storage")
		start(opts)
		class := func(pattern string) error {
			_, err := client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
				ObjectMeta: metav1.ObjectMeta{Name: "evil"}, Provisioner: "rancher.io/local-path", Parameters: map[string]string{"pathPattern": pattern},
			}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
		eventually("a claim's author may not choose the folder", func() bool {
			err := class("../../../../../../../srv/outside/{{ .PVC.Annotations.dir }}")
			return err != nil && strings.Contains(err.Error(), "a claim can get a folder that is not its own")
		})
		for _, pattern := range []string{
			"{{ .PVC.Annotations.dir }}", "{{ .PVC.Labels.dir }}/{{ .PVC.Name }}", "{{ .PVC.Namespace }}", "{{ .PVC.Namespace }}-{{ .PVC.Name }}",
			"../{{ .PVName }}", "a/../{{ .PVName }}", "/{{ .PVName }}", "{{ .PVName }}/..", `{{ printf "%s" ".." }}/{{ .PVName }}`, "fixed", "",
			"{{ .PVC.Namespace }}/{{ .PVC.Name }}/{{ .PVC.Annotations.dir }}", "x\n{{ .PVName }}",
		} {
			if err := class(pattern); err == nil {
				t.Errorf("the pattern %q is let through", pattern)
			}
		}
		for _, pattern := range []string{
			"{{ .PVC.Namespace }}/{{ .PVC.Name }}", "{{.PVC.Namespace}}/{{.PVC.Name}}", "{{ .PVName }}", "fast/{{ .PVName }}", "a.b/c-d/{{ .PVC.Namespace }}/{{ .PVC.Name }}",
			"{{ .PVName }}_{{ .PVC.Namespace }}_{{ .PVC.Name }}",
		} {
			if err := class(pattern); err != nil {
				t.Errorf("the pattern %q is refused: %v", pattern, err)
			}
		}
		other := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Provisioner: "other.example.com", Parameters: map[string]string{"pathPattern": ".."}}
		if _, err := client.StorageV1().StorageClasses().Create(ctx, other, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Errorf("another provisioner's class is refused: %v", err)
		}

		// The provisioner itself, with the permissions that it has.
		eventually("the provisioner has its permissions", func() bool {
			_, err := provisioner(rest).CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
			return err == nil
		})
		eventually("the policy about folders is in force", func() bool {
			_, err := provisioner(rest).CoreV1().Pods(metav1.NamespaceSystem).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "helper"}, Spec: corev1.PodSpec{
				Containers: []corev1.Container{{Name: "helper-pod", Image: "none"}},
				Volumes:    []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}},
			}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err != nil
		})
		for path, allowed := range map[string]bool{
			opts.StorageDir + "/": true, opts.StorageDir + "/shop/": true, opts.StorageDir: true,
			"/srv/outside/": false, opts.StorageDir + "2/": false, filepath.Dir(opts.StorageDir) + "/": false, opts.StorageDir + "/../x/": false, "/": false,
		} {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "helper"}, Spec: corev1.PodSpec{
				Containers: []corev1.Container{{Name: "helper-pod", Image: "none"}},
				Volumes:    []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}},
			}}
			pv := func(source corev1.PersistentVolumeSource) *corev1.PersistentVolume {
				return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
					AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")},
					PersistentVolumeSource: source,
					NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
						MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{"n"}}}}}}},
				}}
			}
			dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
			as := provisioner(rest).CoreV1()
			_, podErr := as.Pods(metav1.NamespaceSystem).Create(ctx, pod, dry)
			_, hostErr := as.PersistentVolumes().Create(ctx, pv(corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}), dry)
			_, localErr := as.PersistentVolumes().Create(ctx, pv(corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: path}}), dry)
			for what, err := range map[string]error{"pod": podErr, "hostPath volume": hostErr, "local volume": localErr} {
				if allowed && err != nil || !allowed && err == nil {
					t.Errorf("%s with %s: %v, want it allowed: %v", what, path, err, allowed)
				}
			}
		}
		pods := kubernetes.NewForConfigOrDie(rest).CoreV1().Pods(metav1.NamespaceSystem)
		if _, err := pods.Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "any"}, Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "any", Image: "none"}},
			Volumes:    []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}},
		}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Errorf("the administrator's pod is refused: %v", err)
		}
	})

	// Every policy compiles against the types that it is for.
	policies, err := client.AdmissionregistrationV1().ValidatingAdmissionPolicies().List(ctx, metav1.ListOptions{LabelSelector: nameLabel})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range policies.Items {
		eventually(p.Name+" is checked", func() bool {
			now, err := client.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(ctx, p.Name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if now.Status.TypeChecking != nil && len(now.Status.TypeChecking.ExpressionWarnings) > 0 {
				t.Fatalf("%s: %v", p.Name, now.Status.TypeChecking.ExpressionWarnings)
			}
			return now.Status.ObservedGeneration == now.Generation
		})
	}
	if !slices.ContainsFunc(policies.Items, func(p admissionv1.ValidatingAdmissionPolicy) bool { return p.Name == "local-path-folder.polymesh.dev" }) {
		t.Error("the add-on has no policy of its folder")
	}
}

// provisioner is the API server's client of the local-path provisioner.
func provisioner(config *rest.Config) kubernetes.Interface {
	as := rest.CopyConfig(config)
	as.Impersonate.UserName = "system:serviceaccount:kube-system:local-path-provisioner-service-account"
	return kubernetes.NewForConfigOrDie(as)
}
