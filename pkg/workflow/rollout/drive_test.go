//go:build integration

package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
)

const (
	oldImage = "shop/api:1.0.0"
	newImage = "shop/api:1.1.0"
	// brokenImage is one whose pods never become ready.
	brokenImage = "shop/api:1.2.0"
)

// admin is the cluster that the tests share. Its pods have no node: kubelet writes what a kubelet would.
type admin struct {
	kubeconfig string
	client     kubernetes.Interface
	dynamic    dynamic.Interface
}

// sick holds the namespaces where the Deployment's own pods do not become ready with the new image.
type sick struct{ sync.Map }

func startCluster(t *testing.T, unready *sick) *admin {
	t.Helper()
	a := &admin{kubeconfig: controlplanetest.Start(t, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))}
	config, err := clientcmd.BuildConfigFromFlags("", a.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 500, 500
	if a.client, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	if a.dynamic, err = dynamic.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	controlplanetest.InstallIstioTypes(t, config)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.kubelet(ctx, unready)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return a
}

// kubelet makes every pod ready that is not.
func (a *admin) kubelet(ctx context.Context, unready *sick) {
	for ctx.Err() == nil {
		pods, err := a.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Pending"})
		if err == nil {
			for i := range pods.Items {
				pod := &pods.Items[i]
				_, sick := unready.Load(pod.Namespace)
				image := pod.Spec.Containers[0].Image
				if image == brokenImage || sick && workloadOf(pod) == "api" && image == newImage {
					continue
				}
				now := metav1.Now()
				pod.Status.Phase, pod.Status.StartTime = corev1.PodRunning, &now
				pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now}}
				_, _ = a.client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// shop is a namespace with a Deployment api, its Service, and a VirtualService of the user's that leads to it.
type shop struct {
	t *testing.T
	*admin
	namespace string
	// agent is what a pod's agent answers: there is no proxy here, so the answers are made, in the form that TestRecorded
	// holds to that of real ones. nil leaves the request to the API server.
	agent func(pod string) (int, io.ReadCloser)
	// request sees each other request first, and answer its answer.
	request func(*http.Request) error
	answer  func(*http.Request)
	as      rest.ImpersonationConfig
}

func (a *admin) shop(t *testing.T, namespace string) *shop {
	t.Helper()
	s := &shop{t: t, admin: a, namespace: namespace}
	s.agent = s.healthy("200")
	for _, text := range []string{
		"{apiVersion: v1, kind: Namespace, metadata: {name: NS}}",
		"{apiVersion: v1, kind: Service, metadata: {name: api, namespace: NS}, spec: {selector: {app: api}, ports: [{name: http, port: 80}]}}",
		"{apiVersion: apps/v1, kind: Deployment, metadata: {name: api, namespace: NS}, spec: {replicas: 1, selector: {matchLabels: {app: api}}, template: {metadata: {labels: {app: api, version: v1}}, spec: {containers: [{name: api, image: '" + oldImage + "'}]}}}}",
		virtualService("outside", "NS", "{hosts: [x], gateways: [g], http: [{route: [{destination: {host: api}}]}]}"),
	} {
		s.create(strings.ReplaceAll(text, "NS", namespace))
	}
	return s
}

func (s *shop) create(text string) {
	s.t.Helper()
	u := route(s.t, text)
	resource, _ := meta.UnsafeGuessKindToResource(u.GroupVersionKind())
	if _, err := s.dynamic.Resource(resource).Namespace(u.GetNamespace()).Create(s.t.Context(), u, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// healthy answers as agents whose pods have had a hundred more requests each time, with this code for the canary's, which has
// none without a weight.
func (s *shop) healthy(code string) func(string) (int, io.ReadCloser) {
	var mu sync.Mutex
	had := map[string]int{}
	return func(pod string) (int, io.ReadCloser) {
		mu.Lock()
		defer mu.Unlock()
		canary := strings.HasPrefix(pod, "api-canary-")
		if state, err := load(context.Background(), s.client, s.namespace, "api"); !canary || err == nil && state.Weight > 0 {
			had[pod] += 100
		}
		if canary {
			return http.StatusOK, s.says(shown().requests(had[pod], received, "api-canary", code).durations(had[pod], 0, received, "api-canary", code))
		}
		return http.StatusOK, s.says(shown().requests(had[pod], received, "api", "200").durations(had[pod], 0, received, "api", "200"))
	}
}

func (s *shop) says(e *exposed) io.ReadCloser {
	text := strings.ReplaceAll(e.text.String(), `namespace="shop"`, `namespace="`+s.namespace+`"`)
	return io.NopCloser(strings.NewReader(strings.ReplaceAll(text, `namespace="web"`, `namespace="`+s.namespace+`"`)))
}

var agentPath = regexp.MustCompile(`/pods/http:([^/]+):15020/proxy/stats/prometheus$`)

type transport struct {
	*shop
	next http.RoundTripper
}

func (tr transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if pod := agentPath.FindStringSubmatch(r.URL.Path); pod != nil && tr.agent != nil {
		code, body := tr.agent(pod[1])
		context.AfterFunc(r.Context(), func() { body.Close() })
		return &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{}, Body: body, Request: r}, nil
	}
	if tr.request != nil {
		if err := tr.request(r); err != nil {
			return nil, err
		}
	}
	response, err := tr.next.RoundTrip(r)
	if tr.answer != nil {
		tr.answer(r)
	}
	return response, err
}

// options are those of a command that has just been started.
func (s *shop) options() Options {
	s.t.Helper()
	flags := genericclioptions.NewConfigFlags(true).WithWrapConfigFn(func(c *rest.Config) *rest.Config {
		c.Impersonate = s.as
		c.Wrap(func(next http.RoundTripper) http.RoundTripper { return transport{s, next} })
		return c
	})
	flags.KubeConfig = &s.kubeconfig
	c, err := cluster.Connect(flags, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return Options{Cluster: c, Namespace: s.namespace, Name: "api", Steps: progress.New(s.t.Output()), Settle: time.Millisecond}
}

func quick() Plan {
	seconds := func(n int) metav1.Duration { return metav1.Duration{Duration: time.Duration(n) * time.Second} }
	return Plan{Steps: []int{50, 100}, Interval: seconds(1), MaxErrorRate: 1, MaxP99: seconds(1), MinRequests: 20, Timeout: seconds(60)}
}

func (s *shop) deployment() *appsv1.Deployment {
	s.t.Helper()
	d, err := s.client.AppsV1().Deployments(s.namespace).Get(s.t.Context(), "api", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *shop) state() *State {
	s.t.Helper()
	state, err := load(s.t.Context(), s.client, s.namespace, "api")
	if err != nil {
		s.t.Fatal(err)
	}
	return state
}

// ended checks that a rollout has left nothing but its record behind.
func (s *shop) ended(phase Phase, image string) {
	s.t.Helper()
	if state := s.state(); state.Phase != phase || state.Final != image {
		s.t.Errorf("it is %s with %s (%s), want %s with %s", state.Phase, state.Final, state.Reason, phase, image)
	}
	d := s.deployment()
	if got := d.Spec.Template.Spec.Containers[0].Image; got != image {
		s.t.Errorf("the Deployment has the image %s, want %s", got, image)
	}
	if text, ok := d.Annotations[specAnnotation]; ok {
		s.t.Errorf("the Deployment still has the annotation: %s", text)
	}
	if _, err := s.client.AppsV1().Deployments(s.namespace).Get(s.t.Context(), "api-canary", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		s.t.Errorf("the canary is still there: %v", err)
	}
	for _, kind := range []schema.GroupVersionResource{virtualServices, destinationRules} {
		found, err := s.dynamic.Resource(kind).Namespace(s.namespace).List(s.t.Context(), metav1.ListOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		for _, u := range found.Items {
			text, _ := json.Marshal(u.Object["spec"])
			if u.GetName() != "outside" || string(text) != `{"gateways":["g"],"hosts":["x"],"http":[{"route":[{"destination":{"host":"api"}}]}]}` {
				s.t.Errorf("left behind: %s %s: %s", kind.Resource, u.GetName(), text)
			}
		}
	}
}

// edit writes the recorded state as anyone can who may write ConfigMaps.
func (s *shop) edit(change func(state map[string]any)) {
	s.t.Helper()
	m, err := s.client.CoreV1().ConfigMaps(s.namespace).Get(s.t.Context(), recordName("api"), metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	state := map[string]any{}
	if err := json.Unmarshal([]byte(m.Data[stateKey]), &state); err != nil {
		s.t.Fatal(err)
	}
	change(state)
	text, err := json.Marshal(state)
	if err != nil {
		s.t.Fatal(err)
	}
	m.Data[stateKey] = string(text)
	if _, err := s.client.CoreV1().ConfigMaps(s.namespace).Update(s.t.Context(), m, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// interrupted starts a rollout and breaks it off in its first step.
func (s *shop) interrupted() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	agent := s.agent
	s.agent = func(pod string) (int, io.ReadCloser) {
		cancel()
		return agent(pod)
	}
	if _, err := Canary(ctx, s.options(), newImage, "", quick()); !errors.Is(err, context.Canceled) {
		s.t.Fatalf("want an interruption, got %v", err)
	}
	if state := s.state(); state.Phase != Running {
		s.t.Fatalf("it is %s", state.Phase)
	}
	s.agent = agent
}

// together runs tests side by side. They wait for most of their time, so the number of cores, which bounds t.Parallel, does
// not matter.
type together struct {
	*testing.T
	wg    sync.WaitGroup
	slots chan struct{}
}

func (g *together) Run(name string, f func(*testing.T)) {
	g.wg.Go(func() {
		g.slots <- struct{}{}
		defer func() { <-g.slots }()
		g.T.Run(name, f)
	})
}

func TestDrive(outer *testing.T) {
	unready := &sick{}
	cluster := startCluster(outer, unready)
	t := &together{T: outer, slots: make(chan struct{}, 16)}
	defer t.wg.Wait()
	short := quick()
	short.Steps = []int{100}

	t.Run("promoted", func(t *testing.T) {
		s := cluster.shop(t, "promoted")
		if _, err := Canary(t.Context(), s.options(), newImage, "", quick()); err != nil {
			t.Fatal(err)
		}
		s.ended(Promoted, newImage)
	})

	t.Run("rolled back", func(t *testing.T) {
		s := cluster.shop(t, "rolled-back")
		s.agent = s.healthy("503")
		r, err := Canary(t.Context(), s.options(), newImage, "", quick())
		if err != nil || !strings.Contains(r.Reason, "at 50 %: error rate 100 %") {
			t.Fatalf("%+v, %v", r, err)
		}
		s.ended(RolledBack, oldImage)
	})
	t.Run("never ready", func(t *testing.T) {
		s := cluster.shop(t, "never-ready")
		plan := quick()
		plan.Timeout.Duration = 5 * time.Second
		r, err := Canary(t.Context(), s.options(), brokenImage, "", plan)
		if err != nil || !strings.Contains(r.Reason, "the pods of api-canary did not become ready") {
			t.Fatalf("%+v, %v", r, err)
		}
		s.ended(RolledBack, oldImage)
	})

	// Whichever read of the Deployment fails after the image has been set, the end that is recorded is what the Deployment has.
	abort := func(t *testing.T, fails int32) (reads int32) {
		s := cluster.shop(t, fmt.Sprintf("abort-%d", fails))
		unready.Store(s.namespace, true)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s.answer = func(r *http.Request) {
			if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/deployments/api") {
				if state, err := load(context.Background(), s.client, s.namespace, "api"); err == nil && state.Phase == Promoting {
					cancel()
				}
			}
		}
		if _, err := Canary(ctx, s.options(), newImage, "", short); !errors.Is(err, context.Canceled) {
			t.Errorf("want an interruption, got %v", err)
		}
		if got := s.deployment().Spec.Template.Spec.Containers[0].Image; got != newImage {
			t.Errorf("the Deployment has %s before the abort", got)
		}
		var count atomic.Int32
		s.answer = nil
		s.request = func(r *http.Request) error {
			if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/deployments/api") && count.Add(1) == fails {
				return errors.New("connection reset by a test")
			}
			return nil
		}
		_, err := Abort(t.Context(), s.options())
		reads = count.Load()
		if state := s.state(); err != nil && state.Phase.Ended() {
			t.Errorf("read %d fails: %v, but it is recorded as %s", fails, err, state.Outcome())
		}
		if err != nil && fails > 0 {
			_, err = Abort(t.Context(), s.options())
		}
		if err != nil {
			t.Error(err)
		}
		s.ended(Aborted, oldImage)
		return reads
	}
	t.Run("abort after the image was set", func(*testing.T) {
		reads := abort(outer, 0)
		if reads < 4 {
			outer.Errorf("only %d reads of the Deployment", reads)
		}
		for i := int32(1); i <= reads; i++ {
			t.Run(fmt.Sprintf("abort, read %d fails", i), func(t *testing.T) { abort(t, i) })
		}
	})

	// A rollout can be broken off after each of its writes.
	writes := func(r *http.Request) bool {
		return r.Method != http.MethodGet && !strings.Contains(r.URL.Path, "/leases")
	}
	t.Run("resumed", func(*testing.T) {
		s := cluster.shop(outer, "resumed")
		var all atomic.Int32
		s.answer = func(r *http.Request) {
			if writes(r) {
				all.Add(1)
			}
		}
		if _, err := Canary(outer.Context(), s.options(), newImage, "", short); err != nil {
			outer.Error(err)
		}
		if all.Load() < 10 {
			outer.Errorf("only %d writes", all.Load())
		}
		for i := int32(1); i <= all.Load(); i++ {
			t.Run(fmt.Sprintf("resumed after write %d", i), func(t *testing.T) {
				s := cluster.shop(t, fmt.Sprintf("resumed-%d", i))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var done atomic.Int32
				s.answer = func(r *http.Request) {
					if writes(r) && done.Add(1) == i {
						cancel()
					}
				}
				if _, err := Canary(ctx, s.options(), newImage, "", short); err == nil && i < all.Load()-1 {
					t.Error("it was not broken off")
				}
				s.answer = nil
				state := s.state() // the first write makes it
				if s.deployment().Annotations[specAnnotation] == "" && !state.Phase.Ended() {
					// Between the record and its confirmation: nothing has been changed yet.
					if _, err := Canary(t.Context(), s.options(), newImage, "", short); err == nil || !strings.Contains(err.Error(), "polymesh rollout abort") {
						t.Errorf("without confirmation: %v", err)
					}
					if _, err := Abort(t.Context(), s.options()); err != nil {
						t.Fatal(err)
					}
					s.ended(Aborted, oldImage)
					return
				}
				if state.Phase.Ended() {
					// Only the confirmation is left, until the next rollout.
					if _, err := Canary(t.Context(), s.options(), oldImage, "", short); err != nil {
						t.Fatal(err)
					}
					s.ended(Promoted, oldImage)
					return
				}
				if _, err := Canary(t.Context(), s.options(), "", "", short); err != nil {
					t.Fatal(err)
				}
				s.ended(Promoted, newImage)
			})
		}
	})

	for name, forge := range map[string]func(map[string]any){
		"image":     func(s map[string]any) { s["image"] = "evil/image:1" },
		"previous":  func(s map[string]any) { s["previous"] = "evil/image:1" },
		"container": func(s map[string]any) { s["container"] = "sidecar" },
		"label":     func(s map[string]any) { s["versionLabel"] = "app.kubernetes.io/version" },
		"promote":   func(s map[string]any) { s["image"], s["phase"], s["weight"] = "evil/image:1", "Promoting", 100 },
		"back": func(s map[string]any) {
			s["previous"], s["phase"], s["image"] = "evil/image:1", "RollingBack", oldImage
		},
	} {
		t.Run("forged "+name, func(t *testing.T) {
			s := cluster.shop(t, "forged-"+name)
			s.interrupted()
			s.edit(forge)
			back := s.state().Phase == RollingBack
			for what, drive := range map[string]func() (*Result, error){
				"canary":  func() (*Result, error) { return Canary(t.Context(), s.options(), "", "", quick()) },
				"promote": func() (*Result, error) { return Promote(t.Context(), s.options()) },
			} {
				if _, err := drive(); err == nil && !back {
					t.Errorf("%s continues", what)
				}
				if got := s.deployment().Spec.Template.Spec.Containers[0].Image; got != oldImage {
					t.Fatalf("%s has set the image %s", what, got)
				}
			}
			if !back {
				if _, err := Abort(t.Context(), s.options()); err != nil {
					t.Fatal(err)
				}
			}
			if phase := s.state().Phase; phase != Aborted {
				t.Errorf("it is %s", phase)
			}
			if got := s.deployment().Spec.Template.Spec.Containers[0].Image; got != oldImage {
				t.Errorf("abort has set the image %s", got)
			}
			pods, err := s.client.CoreV1().Pods(s.namespace).List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, pod := range pods.Items {
				if strings.HasPrefix(pod.Spec.Containers[0].Image, "evil") {
					t.Errorf("pod %s runs it", pod.Name)
				}
			}
		})
	}

	// What no rollout writes is refused, and does not end the program.
	t.Run("malformed", func(t *testing.T) {
		s := cluster.shop(t, "malformed")
		s.interrupted()
		original := s.state()
		for name, forge := range map[string]func(map[string]any){
			"no steps":      func(s map[string]any) { s["plan"].(map[string]any)["steps"] = []int{} },
			"falling steps": func(s map[string]any) { s["plan"].(map[string]any)["steps"] = []int{50, 10, 100} },
			"step":          func(s map[string]any) { s["step"] = 7 },
			"before steps":  func(s map[string]any) { s["step"] = -1 },
			"weight":        func(s map[string]any) { s["weight"] = -5 },
			"namespace":     func(s map[string]any) { s["namespace"] = "kube-system" },
			"name":          func(s map[string]any) { s["name"] = "other" },
			"phase":         func(s map[string]any) { s["phase"] = "\x1b[2J" },
			"image":         func(s map[string]any) { s["image"] = "a b" },
			"route":         func(s map[string]any) { s["virtualServices"] = []string{"../x"} },
		} {
			s.edit(forge)
			for what, do := range map[string]func() error{
				"canary": func() error { _, err := Canary(t.Context(), s.options(), "", "", quick()); return err },
				"abort":  func() error { _, err := Abort(t.Context(), s.options()); return err },
				"get":    func() error { _, err := Get(t.Context(), s.options().Cluster, s.namespace, "api"); return err },
			} {
				if err := do(); err == nil || !strings.Contains(err.Error(), "is not a valid record of a rollout") {
					t.Errorf("%s: %s says %v", name, what, err)
				}
			}
			s.edit(func(state map[string]any) {
				text, _ := json.Marshal(original)
				clear(state)
				_ = json.Unmarshal(text, &state)
			})
		}
		if _, err := Abort(t.Context(), s.options()); err != nil {
			t.Fatal(err)
		}
		s.ended(Aborted, oldImage)
	})

	// The state changes while a machine drives the rollout.
	t.Run("forged meanwhile", func(t *testing.T) {
		s := cluster.shop(t, "forged-meanwhile")
		agent, once := s.agent, sync.Once{}
		s.agent = func(pod string) (int, io.ReadCloser) {
			once.Do(func() {
				s.edit(func(state map[string]any) { state["image"], state["phase"] = "evil/image:1", "Promoting" })
			})
			return agent(pod)
		}
		if _, err := Canary(t.Context(), s.options(), newImage, "", quick()); err == nil || !strings.Contains(err.Error(), "the ConfigMap describes another rollout than before") {
			t.Errorf("it says %v", err)
		}
		if got := s.deployment().Spec.Template.Spec.Containers[0].Image; got != oldImage {
			t.Errorf("the Deployment has %s", got)
		}
		if _, err := Abort(t.Context(), s.options()); err != nil {
			t.Fatal(err)
		}
		s.ended(Aborted, oldImage)
	})

	// A ConfigMap that someone writes does not make the user remove what is not a rollout's.
	t.Run("not the rollout's", func(t *testing.T) {
		s := cluster.shop(t, "strange")
		s.interrupted()
		state := s.state()
		if _, err := Abort(t.Context(), s.options()); err != nil {
			t.Fatal(err)
		}
		s.create("{apiVersion: apps/v1, kind: Deployment, metadata: {name: api-canary, namespace: strange, labels: {polymesh.dev/rollout: api}}, spec: {replicas: 1, selector: {matchLabels: {app: own}}, template: {metadata: {labels: {app: own}}, spec: {containers: [{name: a, image: a}]}}}}")
		s.edit(func(s map[string]any) {
			text, _ := json.Marshal(state)
			clear(s)
			_ = json.Unmarshal(text, &s)
		})
		if _, err := Abort(t.Context(), s.options()); err == nil || !strings.Contains(err.Error(), "exists: the canary needs this name") {
			t.Errorf("it says %v", err)
		}
		if _, err := s.client.AppsV1().Deployments(s.namespace).Get(t.Context(), "api-canary", metav1.GetOptions{}); err != nil {
			t.Errorf("the user's own Deployment: %v", err)
		}
	})

	// That the metrics may not be read, or cannot be, is no fault of the canary's.
	t.Run("forbidden", func(t *testing.T) {
		s := cluster.shop(t, "forbidden")
		s.agent, s.as = nil, rest.ImpersonationConfig{UserName: "dev"}
		verbs := []string{"get", "list", "watch", "create", "update", "patch", "delete"}
		role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "dev"}, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"", "apps", "networking.istio.io", "coordination.k8s.io", "gateway.networking.k8s.io"}, Verbs: verbs,
				Resources: []string{"httproutes", "grpcroutes", "deployments", "replicasets", "pods", "events", "services", "configmaps", "leases", "virtualservices", "destinationrules"}}}}
		if _, err := s.client.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "dev"}, Subjects: []rbacv1.Subject{{Kind: "User", Name: "dev", APIGroup: "rbac.authorization.k8s.io"}},
			RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "dev"}}
		if _, err := s.client.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		o := s.options()
		eventually(t, "the role", func() bool {
			_, err := o.Cluster.Client.CoreV1().ConfigMaps(s.namespace).List(t.Context(), metav1.ListOptions{})
			return err == nil
		})
		_, err := Canary(t.Context(), o, newImage, "", quick())
		if err == nil || !strings.Contains(err.Error(), "at 50 %, which stays so") || !strings.Contains(err.Error(), "pods/proxy") {
			t.Errorf("it says %v", err)
		}
		if state := s.state(); state.Phase != Running || state.Weight != 50 {
			t.Errorf("it is %s at %d", state.Phase, state.Weight)
		}
		s.as = rest.ImpersonationConfig{}
		s.agent = s.healthy("200")
		if _, err := Abort(t.Context(), s.options()); err != nil {
			t.Fatal(err)
		}
		s.ended(Aborted, oldImage)
	})

	for name, text := range map[string]string{
		"malformed": "istio_requests_total{destination_workload_namespace=\"NS\",x} 1\n",
		"long":      "istio_requests_total{destination_workload_namespace=\"NS\",x=\"" + strings.Repeat("x", maxLine) + "\"} 1\n",
	} {
		t.Run("unreadable "+name, func(t *testing.T) {
			s := cluster.shop(t, "unreadable-"+name)
			healthy := s.agent
			s.agent = func(pod string) (int, io.ReadCloser) {
				if strings.HasPrefix(pod, "api-canary-") {
					return http.StatusOK, io.NopCloser(strings.NewReader(strings.ReplaceAll(text, "NS", s.namespace)))
				}
				return healthy(pod)
			}
			o := s.options()
			o.Unread = 2 * time.Second
			_, err := Canary(t.Context(), o, newImage, "", quick())
			if err == nil || !strings.Contains(err.Error(), "the canary's state is unknown") || !errors.Is(err, errUnread) {
				t.Errorf("it says %v", err)
			}
			if state := s.state(); state.Phase != Running {
				t.Errorf("it is %s", state.Phase)
			}
			s.agent = healthy
			if _, err := Canary(t.Context(), s.options(), "", "", quick()); err != nil {
				t.Fatal(err)
			}
			s.ended(Promoted, newImage)
		})
	}

	// A caller's pod may answer anything.
	t.Run("hostile callers", func(t *testing.T) {
		s := cluster.shop(t, "hostile")
		for _, name := range []string{"client", "hangs"} {
			s.create("{apiVersion: v1, kind: Pod, metadata: {name: " + name + ", namespace: hostile}, spec: {containers: [{name: a, image: a}]}}")
		}
		healthy := s.agent
		s.agent = func(pod string) (int, io.ReadCloser) {
			switch pod {
			case "client":
				return http.StatusOK, io.NopCloser(endless{})
			case "hangs":
				return http.StatusOK, hanging(t)
			}
			code, body := healthy(pod)
			text, err := io.ReadAll(body)
			if err != nil {
				t.Error(err)
			}
			also := strings.ReplaceAll(strings.ReplaceAll(string(text), `source_workload="client"`, `source_workload="hangs"`), "# TYPE", "# HELP")
			return code, io.NopCloser(strings.NewReader(string(text) + strings.Join(regexp.MustCompile(`(?m)^istio_requests_total.*\n`).FindAllString(also, -1), "")))
		}
		o := s.options()
		o.ReadTimeout = 2 * time.Second // of the one that hangs
		if _, err := Canary(t.Context(), o, newImage, "", short); err != nil {
			t.Fatal(err)
		}
		s.ended(Promoted, newImage)
	})
}

// endless is an answer without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// hanging is an answer that never comes, until the test ends.
func hanging(t *testing.T) io.ReadCloser {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}
