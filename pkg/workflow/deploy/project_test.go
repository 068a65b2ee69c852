//go:build integration

package deploy

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/kubectl/pkg/cmd/apply"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// tree is a folder of a project's manifests, deployed to a real API server without nodes.
type tree struct {
	t          *testing.T
	kubeconfig string
	dir        string
	client     *cluster.Cluster
}

func newTree(t *testing.T, kubeconfig string, path ...string) *tree {
	t.Helper()
	p := &tree{t: t, kubeconfig: kubeconfig, dir: filepath.Join(append([]string{t.TempDir()}, path...)...)}
	var err error
	if p.client, err = cluster.Connect(p.flags(), nil); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *tree) flags() *genericclioptions.ConfigFlags {
	flags := genericclioptions.NewConfigFlags(true)
	flags.KubeConfig = &p.kubeconfig
	return flags
}

func (p *tree) write(name, text string) {
	p.t.Helper()
	file := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

func (p *tree) options(change ...func(*Options)) Options {
	p.t.Helper()
	in, err := project.Load(p.dir)
	if err != nil {
		p.t.Fatal(err)
	}
	o := Options{Project: in, Cluster: p.flags(), Steps: &progress.Steps{}}
	for _, c := range change {
		c(&o)
	}
	return o
}

// removal returns the options of Remove, with or without the namespace, and volumes.
func (p *tree) removal(namespace, volumes bool) RemoveOptions {
	p.t.Helper()
	o := p.options()
	return RemoveOptions{Project: o.Project, Cluster: o.Cluster, Steps: o.Steps, Namespace: namespace, Volumes: volumes}
}

// deploy must work. It returns what happened to each object.
func (p *tree) deploy(change ...func(*Options)) (map[string]Action, []Left) {
	p.t.Helper()
	r, err := Run(p.t.Context(), p.options(change...))
	if err != nil {
		p.t.Fatal(err)
	}
	actions := map[string]Action{}
	for _, c := range r.Objects {
		actions[c.ID] = c.Action
	}
	return actions, r.Left
}

// refused must not work.
func (p *tree) refused(want string, change ...func(*Options)) {
	p.t.Helper()
	if _, err := Run(p.t.Context(), p.options(change...)); err == nil || !strings.Contains(err.Error(), want) {
		p.t.Errorf("error is %v, want %q", err, want)
	}
}

func (p *tree) hasConfigMap(namespace, name string) bool {
	p.t.Helper()
	_, err := p.client.Client.CoreV1().ConfigMaps(namespace).Get(p.t.Context(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		p.t.Fatal(err)
	}
	return err == nil
}

func (p *tree) hasClaim(namespace, name string) bool {
	p.t.Helper()
	claim, err := p.client.Client.CoreV1().PersistentVolumeClaims(namespace).Get(p.t.Context(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		p.t.Fatal(err)
	}
	return err == nil && claim.DeletionTimestamp == nil
}

func adopt(o *Options)   { o.Adopt = true }
func volumes(o *Options) { o.Volumes = true }
func dry(o *Options)     { o.DryRun = true }

const (
	claim  = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: shop-data}\nspec: {accessModes: [ReadWriteOnce], storageClassName: none, resources: {requests: {storage: 1Mi}}}\n"
	things = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: shop-settings}\ndata: {a: \"1\"}\n---\n" + claim
	others = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: blog-settings}\ndata: {a: \"1\"}\n"
)

// TestProject goes through what a deploy may take away, and from whom, with a real API server.
func TestProject(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.NewTextHandler(os.Stderr, nil)))

	t.Run("two folders of one name", func(t *testing.T) {
		anna, bert := newTree(t, kubeconfig, "anna", "case-app"), newTree(t, kubeconfig, "bert", "case-app")
		anna.write("k8s/a.yaml", things)
		bert.write("k8s/b.yaml", others)
		anna.deploy()
		for _, change := range [][]func(*Options){nil, {dry}, {volumes}} {
			bert.refused("project case-app in namespace case-app was deployed from elsewhere\n  there: "+anna.dir, change...)
		}
		if _, err := Remove(t.Context(), bert.removal(true, false)); err == nil || !strings.Contains(err.Error(), "was deployed from elsewhere") {
			t.Errorf("undeploy: %v", err)
		}
		if bert.hasConfigMap("case-app", "blog-settings") || !anna.hasConfigMap("case-app", "shop-settings") || !anna.hasClaim("case-app", "shop-data") {
			t.Error("a deploy that was refused has changed something")
		}
		if actions, _ := anna.deploy(); actions["configmap/shop-settings -n case-app"] != Unchanged {
			t.Errorf("the first project again: %v", actions)
		}

		// With a name of its own, both are there; but not with an object that is the other's.
		bert.write("polymesh.yaml", "apiVersion: polymesh.dev/v1\nkind: Project\nname: blog\nnamespace: case-app\n")
		bert.deploy()
		bert.write("k8s/b.yaml", others+"---\n"+strings.Split(things, "---")[0])
		bert.refused("k8s/b.yaml:6: configmap/shop-settings -n case-app belongs to project case-app in namespace case-app (" + anna.dir)
		anna.deploy()
		if !anna.hasConfigMap("case-app", "shop-settings") || !bert.hasConfigMap("case-app", "blog-settings") {
			t.Error("one has removed the other's")
		}
		if _, err := Remove(t.Context(), anna.removal(true, false)); err == nil || !strings.Contains(err.Error(), "also holds blog") {
			t.Errorf("undeploy with the namespace: %v", err)
		}
	})

	t.Run("a project that has moved", func(t *testing.T) {
		p := newTree(t, kubeconfig, "before", "moves")
		p.write("k8s/a.yaml", things+"---\n"+others)
		p.deploy()
		moved := filepath.Join(t.TempDir(), "after", "moves")
		if err := os.MkdirAll(filepath.Dir(moved), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p.dir, moved); err != nil {
			t.Fatal(err)
		}
		p.dir = moved
		p.write("k8s/a.yaml", others)
		p.refused("take it over once with --adopt")
		actions, left := p.deploy(adopt)
		if actions["configmap/shop-settings -n moves"] != "" || len(left) != 2 || !p.hasConfigMap("moves", "shop-settings") {
			t.Errorf("taking it over has removed something: %v, left %v", actions, left)
		}
		actions, left = p.deploy()
		if actions["configmap/shop-settings -n moves"] != Pruned || len(left) != 1 || left[0] != (Left{"persistentvolumeclaim/shop-data -n moves", holdsData}) {
			t.Errorf("the deploy after it: %v, left %v", actions, left)
		}
	})

	t.Run("an id", func(t *testing.T) {
		a, b := newTree(t, kubeconfig, "a"), newTree(t, kubeconfig, "b")
		for _, p := range []*tree{a, b} {
			p.write("polymesh.yaml", "apiVersion: polymesh.dev/v1\nkind: Project\nname: with-id\nid: \"4711\"\n")
			p.write("k8s/a.yaml", others)
		}
		a.deploy()
		b.deploy()
		b.write("polymesh.yaml", "apiVersion: polymesh.dev/v1\nkind: Project\nname: with-id\nid: other\n")
		b.refused("id 4711")
	})

	t.Run("a set without an origin", func(t *testing.T) {
		p := newTree(t, kubeconfig, "old")
		p.write("k8s/a.yaml", others)
		p.deploy()
		patch := []byte(`{"metadata":{"annotations":{"` + originAnnotation + `":null}}}`)
		if _, err := p.client.Client.CoreV1().Secrets("old").Patch(t.Context(), "polymesh-old", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		p.refused("there: an unknown place")
		p.deploy(adopt)
		p.deploy()
	})

	t.Run("what holds data", func(t *testing.T) { holdsDataTest(t, newTree(t, kubeconfig, "volumes")) })
	t.Run("what is not the project's", func(t *testing.T) { foreignTest(t, newTree(t, kubeconfig, "foreign")) })
	t.Run("a Job whose template changes", func(t *testing.T) { jobTest(t, newTree(t, kubeconfig, "jobs")) })
	t.Run("a workload without a namespace", func(t *testing.T) { awaitTest(t, newTree(t, kubeconfig, "await")) })
	t.Run("an object of one name", func(t *testing.T) {
		p := newTree(t, kubeconfig, "case-twice")
		p.write("k8s/a.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {from: a}\n")
		p.write("k8s/b.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings, namespace: case-twice}\ndata: {from: b}\n")
		p.refused("k8s/b.yaml:1: configmap/settings -n case-twice is already at k8s/a.yaml:1")
	})
	t.Run("objects that do not fit their types", func(t *testing.T) {
		p := newTree(t, kubeconfig, "typed")
		p.write("k8s/a.yaml", others)
		p.deploy()
		p.write("k8s/b.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: first}\n")
		p.write("k8s/c.yaml", `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: my-registry/go-service:1.0.0
        env:
        - name: PORT
          value: 8080
        ports:
        - containerPort: "80"
---
apiVersion: v1
kind: ConfigMap
metadata: {name: debug}
data:
  debug: true
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ports:
  - port: 80000
`)
		_, err := Run(t.Context(), p.options())
		if err == nil {
			t.Fatal("they are taken")
		}
		for _, want := range []string{"k8s/c.yaml:14: apply deployment.apps/web -n typed: ", "got 8080 (write it in quotes", "k8s/c.yaml:16: apply", "k8s/c.yaml:22: apply configmap/debug", "k8s/c.yaml:29: apply service/web"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error has no %q:\n%v", want, err)
			}
		}
		if p.hasConfigMap("typed", "first") {
			t.Error("half of it was applied")
		}
	})
	t.Run("a secret made by hand", func(t *testing.T) {
		p := newTree(t, kubeconfig, "by-hand")
		p.write("k8s/a.yaml", others)
		p.deploy()
		secrets := p.client.Client.CoreV1().Secrets("by-hand")
		if _, err := secrets.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "db"}, StringData: map[string]string{"url": "x"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		p.write("polymesh.yaml", "apiVersion: polymesh.dev/v1\nkind: Project\nsecrets:\n- name: db\n  data: {url: {env: NO_SUCH_VARIABLE}}\n")
		p.deploy()
		if _, err := Remove(t.Context(), p.removal(false, false)); err != nil {
			t.Fatal(err)
		}
		if _, err := secrets.Get(t.Context(), "db", metav1.GetOptions{}); err != nil {
			t.Errorf("it is gone with the project: %v", err)
		}
	})
	t.Run("two at once", func(t *testing.T) {
		// The namespace is there, so that nothing but the claim decides.
		a, b := newTree(t, kubeconfig, "a", "race"), newTree(t, kubeconfig, "b", "race")
		if _, err := a.client.Client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "race"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		errs := make(chan error, 2)
		for _, p := range []*tree{a, b} {
			p.write("k8s/a.yaml", others)
			o := p.options()
			go func() {
				_, err := Run(context.WithoutCancel(t.Context()), o)
				errs <- err
			}()
		}
		worked := 0
		for range 2 {
			if err := <-errs; err == nil {
				worked++
			} else if !strings.Contains(err.Error(), "was deployed from elsewhere") {
				t.Error(err)
			}
		}
		if worked != 1 {
			t.Errorf("%d deploys got the name", worked)
		}
	})
}

func holdsDataTest(t *testing.T, p *tree) {
	const set = "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: db}\nspec:\n  replicas: 0\n  persistentVolumeClaimRetentionPolicy: {whenDeleted: Delete}\n  selector: {matchLabels: {app: db}}\n  template: {metadata: {labels: {app: db}}, spec: {containers: [{name: db, image: \"db:1\"}]}}\n"
	p.write("k8s/a.yaml", things+"---\n"+set)
	p.deploy()
	p.write("k8s/a.yaml", others)
	for _, change := range [][]func(*Options){{dry}, nil, nil} {
		actions, left := p.deploy(change...)
		if len(left) != 2 || left[0] != (Left{"persistentvolumeclaim/shop-data -n volumes", holdsData}) || left[1] != (Left{"statefulset.apps/db -n volumes", holdsData}) {
			t.Errorf("left are %v, actions %v", left, actions)
		}
	}
	if !p.hasClaim("volumes", "shop-data") || p.hasConfigMap("volumes", "shop-settings") {
		t.Error("the claim went, or the ConfigMap did not")
	}
	// It is still the project's.
	p.write("k8s/a.yaml", others+"---\n"+claim)
	if actions, left := p.deploy(); actions["persistentvolumeclaim/shop-data -n volumes"] != Unchanged || len(left) != 1 {
		t.Errorf("with the claim again: %v, %v", actions, left)
	}

	removed, err := Remove(t.Context(), p.removal(false, false))
	if err != nil || len(removed.Left) != 2 || !p.hasClaim("volumes", "shop-data") || p.hasConfigMap("volumes", "blog-settings") {
		t.Errorf("undeploy: %+v, %v", removed, err)
	}
	if _, err := Remove(t.Context(), p.removal(true, false)); err == nil || !strings.Contains(err.Error(), "persistent volume claims shop-data: use --prune-volumes") {
		t.Errorf("undeploy with the namespace: %v", err)
	}
	// The claim's own controller keeps it while it is protected; nothing uses it here.
	removed, err = Remove(t.Context(), p.removal(false, true))
	if err != nil || len(removed.Left) != 0 || p.hasClaim("volumes", "shop-data") {
		t.Errorf("undeploy with volumes: %+v, %v", removed, err)
	}
	if _, err := Remove(t.Context(), p.removal(false, false)); err == nil || !strings.Contains(err.Error(), "project volumes is not deployed in namespace volumes") {
		t.Errorf("undeploy once more: %v", err)
	}
}

func foreignTest(t *testing.T, p *tree) {
	p.write("k8s/a.yaml", others)
	p.deploy()
	configMaps := p.client.Client.CoreV1().ConfigMaps("foreign")
	made, err := configMaps.Get(t.Context(), "blog-settings", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	label := map[string]string{apply.ApplysetPartOfLabel: made.Labels[apply.ApplysetPartOfLabel]}
	isController := true
	for name, owners := range map[string][]metav1.OwnerReference{
		"copied": nil,
		"owned":  {{APIVersion: "v1", Kind: "ConfigMap", Name: made.Name, UID: made.UID, Controller: &isController}},
	} {
		if _, err := configMaps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: label, OwnerReferences: owners}}, metav1.CreateOptions{FieldManager: "kubectl-create"}); err != nil {
			t.Fatal(err)
		}
	}
	_, left := p.deploy()
	if !p.hasConfigMap("foreign", "copied") || !p.hasConfigMap("foreign", "owned") || len(left) != 1 || left[0] != (Left{"configmap/copied -n foreign", notApplied}) {
		t.Errorf("what others made was removed: left %v", left)
	}
}

func jobTest(t *testing.T, p *tree) {
	write := func(word string) {
		p.write("k8s/a.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {word: "+word+"}\n")
		p.write("k8s/migrate.yaml", "apiVersion: batch/v1\nkind: Job\nmetadata: {name: migrate}\nspec:\n  template:\n    spec:\n      restartPolicy: Never\n      containers:\n      - {name: migrate, image: \"migrate:1\", args: ["+word+"]}\n")
	}
	const id = "job.batch/migrate -n jobs"
	write("one")
	p.deploy()
	write("two")
	p.refused("k8s/migrate.yaml:1: " + id + " is running, and what a Job runs cannot be changed: wait")
	settings, err := p.client.Client.CoreV1().ConfigMaps("jobs").Get(t.Context(), "settings", metav1.GetOptions{})
	if err != nil || settings.Data["word"] != "one" {
		t.Errorf("half of it was applied: %v, %v", settings.Data, err)
	}

	// There is no kubelet, so its pod ends by hand.
	jobs := p.client.Client.BatchV1().Jobs("jobs")
	err = wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		pods, err := p.client.Client.CoreV1().Pods("jobs").List(ctx, metav1.ListOptions{LabelSelector: "job-name=migrate"})
		if err != nil {
			return false, err
		}
		for _, pod := range pods.Items {
			if pod.Status.Phase == corev1.PodPending {
				pod.Status.Phase = corev1.PodSucceeded
				if _, err := p.client.Client.CoreV1().Pods("jobs").UpdateStatus(ctx, &pod, metav1.UpdateOptions{}); err != nil && !apierrors.IsConflict(err) {
					return false, err
				}
			}
		}
		job, err := jobs.Get(ctx, "migrate", metav1.GetOptions{})
		return err == nil && job.Status.CompletionTime != nil, err
	})
	if err != nil {
		t.Fatalf("the job does not end: %v", err)
	}
	before, err := jobs.Get(t.Context(), "migrate", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if actions, _ := p.deploy(dry); actions[id] != Replaced {
		t.Errorf("a dry run: %v", actions)
	}
	if actions, _ := p.deploy(); actions[id] != Replaced {
		t.Errorf("the deploy: %v", actions)
	}
	after, err := jobs.Get(t.Context(), "migrate", metav1.GetOptions{})
	if err != nil || after.UID == before.UID || !slices.Equal(after.Spec.Template.Spec.Containers[0].Args, []string{"two"}) {
		t.Errorf("the job is %s, args %v, %v", after.UID, after.Spec.Template.Spec.Containers, err)
	}
	if actions, _ := p.deploy(); actions[id] != Unchanged {
		t.Errorf("once more: %v", actions)
	}
}

// awaitTest has a workload that names no namespace.
func awaitTest(t *testing.T, p *tree) {
	o := project.NewObject(map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": "none"}})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := p.client.Await(ctx, &progress.Steps{}, o, nil); !errors.Is(err, cluster.ErrNotReady) {
		t.Errorf("error %v", err)
	}
}
