package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/test/e2e/node"
)

//go:embed languages.yaml
var languageManifests string

const (
	deployCold, deployWarm, deployLine figureID = "deploy: cold", "deploy: warm", "deploy: changed line"
	devGo, devPython                   figureID = "dev: go-service", "dev: fastapi-service"
	// deployLimit is the timeout of one deploy that builds and downloads everything.
	deployLimit = 30 * time.Minute
)

// language is one of the app's services.
type language struct {
	Service, name string
	manifests     string // folder in k8s/
}

var languages = []language{
	{"go-service", "Go", "go"}, {"fastapi-service", "Python", "fastapi"}, {"java-service", "Java", "java"},
	{"node-service", "JavaScript", "node"}, {"rust-service", "Rust", "rust"},
}

func (l language) figure(what string) figureID {
	return figureID("language: " + l.Service + ": " + what)
}

// workflow measures deploy and dev of the app in five languages, and then the load that each of its services can handle through the
// gateway.
func (b *bench) workflow(ctx context.Context) error {
	if out, err := exec.CommandContext(ctx, filepath.Join(b.top, "examples", "polyglot", "images.sh"), "all").CombinedOutput(); err != nil {
		return fmt.Errorf("images.sh all: %w: %s", err, out)
	}
	// The CPU requests of five sidecars with the default profile do not fit on two cores with the services.
	return b.on(ctx, node.Options{Args: []string{"--mesh-profile", "demo"}}, func(n *node.Node) error {
		if err := startReady(ctx, n); err != nil {
			return err
		}
		w, err := b.newWorkflow(ctx, n)
		if err != nil {
			return err
		}
		defer w.close()
		for _, measure := range []func(context.Context) error{w.deploys, w.dev, w.imageSizes, w.languages} {
			if err := measure(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// workflow is a copy of examples/polyglot, deployed by a program in this machine's own network, where builds can reach
// package registries. It reaches the node's API server through a relay.
type workflow struct {
	*bench
	n       *node.Node
	dir     string // of the project
	storage string // buildah's storage.conf
	program string
	env     []string
	relay   net.Listener
}

func (b *bench) newWorkflow(ctx context.Context, n *node.Node) (*workflow, error) {
	w := &workflow{bench: b, n: n, dir: filepath.Join(n.Dir, "polyglot"), storage: filepath.Join(n.Dir, "storage.conf")}
	var err error
	if w.program, err = node.Program(); err != nil {
		return nil, err
	}
	if err := w.copyProject(); err != nil {
		return nil, err
	}
	if err := w.copyBases(ctx); err != nil {
		return nil, err
	}
	kubeconfig, err := w.startRelay()
	if err != nil {
		return nil, err
	}
	// The download cache of builds, initially empty.
	temporary := filepath.Join(n.Dir, "tmp")
	if err := os.Mkdir(temporary, 0o755); err != nil {
		return nil, err
	}
	w.env = append(os.Environ(), "TMPDIR="+temporary, "KUBECONFIG="+kubeconfig, "POLYMESH_DATA_DIR="+n.DataDir(), "KUBECACHEDIR="+filepath.Join(n.Dir, "kubecache"),
		"CONTAINERS_STORAGE_CONF="+w.storage, "DATABASE_URL=postgresql://user:pass@postgres.external:5432/mydb")
	return w, nil
}

func (w *workflow) close() { w.relay.Close() }

// copyProject copies the app without calls between services, so that each can be measured alone, and gives its builds this
// machine's trusted certificates and resolver.
func (w *workflow) copyProject() error {
	from := filepath.Join(w.top, "examples", "polyglot")
	for _, part := range []string{"services", "k8s", "istio", "polymesh.yaml"} {
		if out, err := exec.Command("cp", "-r", "--parents", filepath.Join(from, part), w.n.Dir).CombinedOutput(); err != nil {
			return fmt.Errorf("copy %s: %w: %s", part, err, out)
		}
	}
	if err := os.Rename(filepath.Join(w.n.Dir, from), w.dir); err != nil {
		return err
	}
	var mounts []string
	for host, inside := range map[string]string{
		"/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt",
		"/etc/pip.conf":                      "/etc/pip.conf",
	} {
		if _, err := os.Stat(host); err == nil {
			mounts = append(mounts, fmt.Sprintf("%q", host+":"+inside))
		}
	}
	var services strings.Builder
	services.WriteString("services:\n")
	for _, l := range languages {
		// Leave out files that a service's own tools create next to its sources.
		for _, made := range []string{"node_modules", "target"} {
			if err := os.RemoveAll(filepath.Join(w.dir, "services", l.Service, made)); err != nil {
				return err
			}
		}
		fmt.Fprintf(&services, "  - {name: %s, mounts: [%s]}\n", l.Service, strings.Join(mounts, ", "))
		for _, file := range []string{"deployment.yaml", "configmap.yaml"} {
			if err := edit(filepath.Join(w.dir, "k8s", l.manifests, file), nextURL, ""); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return edit(filepath.Join(w.dir, "polymesh.yaml"), regexp.MustCompile(`\z`), services.String())
}

// nextURL is the next service of the chain, in a Deployment or a ConfigMap.
var nextURL = regexp.MustCompile(`(?m)^ *- name: NEXT_URL\n *value: .*\n|^ *NEXT_URL: .*\n`)

func edit(file string, old *regexp.Regexp, with string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return os.WriteFile(file, old.ReplaceAll(text, []byte(with)), 0o644)
}

// from matches the images that a Dockerfile starts from.
var from = regexp.MustCompile(`(?m)^FROM (\S+)`)

// copyBases creates a storage for buildah with the services' base images, and no build results.
func (w *workflow) copyBases(ctx context.Context) error {
	conf := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n[storage.options.overlay]\nskip_mount_home = \"true\"\n",
		filepath.Join(w.n.Dir, "storage"), filepath.Join(w.n.Dir, "run"))
	if err := os.WriteFile(w.storage, []byte(conf), 0o644); err != nil {
		return err
	}
	bases := map[string]bool{}
	for _, l := range languages {
		text, err := os.ReadFile(filepath.Join(w.dir, "services", l.Service, "Dockerfile"))
		if err != nil {
			return err
		}
		for _, found := range from.FindAllSubmatch(text, -1) {
			bases[string(found[1])] = true
		}
	}
	made := filepath.Join(w.top, ".build", "polyglot", "storage.conf")
	for base := range bases {
		archive := filepath.Join(w.n.Dir, "base.tar")
		name := base
		if !strings.Contains(base, "/") {
			name = "docker.io/library/" + base
		}
		if !strings.Contains(filepath.Base(name), ":") {
			name += ":latest"
		}
		if _, err := buildah(ctx, made, "push", "--quiet", name, "oci-archive:"+archive+":"+name); err != nil {
			return err
		}
		if _, err := buildah(ctx, w.storage, "pull", "--quiet", "oci-archive:"+archive); err != nil {
			return err
		}
		if err := os.Remove(archive); err != nil {
			return err
		}
	}
	return nil
}

func buildah(ctx context.Context, storage string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "buildah", args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_STORAGE_CONF="+storage)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("buildah %s: %w: %s", strings.Join(args, " "), err, &errOut)
	}
	return out.String(), nil
}

// startRelay listens on loopback for the node's API server, and returns a kubeconfig for it.
func (w *workflow) startRelay() (string, error) {
	var err error
	if w.relay, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return "", err
	}
	go func() {
		for {
			caller, err := w.relay.Accept()
			if err != nil {
				return
			}
			go w.carry(caller)
		}
	}()
	config, err := clientcmd.LoadFromFile(w.n.Kubeconfig())
	if err != nil {
		return "", err
	}
	for _, cluster := range config.Clusters {
		cluster.Server = "https://" + w.relay.Addr().String()
	}
	file := filepath.Join(w.n.Dir, "relay.yaml")
	return file, clientcmd.WriteToFile(*config, file)
}

func (w *workflow) carry(caller net.Conn) {
	defer caller.Close()
	server, err := w.n.Dial(context.Background(), "tcp", "127.0.0.1:6443")
	if err != nil {
		return
	}
	defer server.Close()
	var both sync.WaitGroup
	copyTo := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // a broken connection ends like a closed one
		_ = to.(interface{ CloseWrite() error }).CloseWrite()
	}
	both.Go(func() { copyTo(server, caller) })
	both.Go(func() { copyTo(caller, server) })
	both.Wait()
}

func (w *workflow) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, w.program, args...)
	cmd.Env = w.env
	return cmd
}

// deploy runs `polymesh deploy` and records its duration.
func (w *workflow) deploy(ctx context.Context, id figureID) (*deploy.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, deployLimit)
	defer cancel()
	cmd := w.command(ctx, "deploy", "-o", "json", "--timeout", "10m", w.dir)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("polymesh deploy: %w: %s", err, &errOut)
	}
	w.results.add(id, time.Since(start).Seconds())
	var result deploy.Result
	return &result, json.Unmarshal(out.Bytes(), &result)
}

func (w *workflow) deploys(ctx context.Context) error {
	if _, err := w.deploy(ctx, deployCold); err != nil {
		return err
	}
	again, err := w.deploy(ctx, deployWarm)
	if err != nil {
		return err
	}
	for _, o := range again.Objects {
		if o.Action != deploy.Unchanged {
			return fmt.Errorf("a second deploy changes %+v", o)
		}
	}
	if err := w.change(devGo, "Request processed by Go Gateway", "changed once"); err != nil {
		return err
	}
	_, err = w.deploy(ctx, deployLine)
	return err
}

// change replaces a text in a service's source, and in its tests, which are part of the build.
func (w *workflow) change(id figureID, old, fresh string) error {
	service, files := "go-service", []string{"main.go", "main_test.go"}
	if id == devPython {
		service, files = "fastapi-service", []string{"main.py", "test_main.py"}
	}
	for _, file := range files {
		if err := edit(filepath.Join(w.dir, "services", service, file), regexp.MustCompile(regexp.QuoteMeta(old)), fresh); err != nil {
			return err
		}
	}
	return nil
}

// dev measures from saving a file to the gateway's first response from the new code.
func (w *workflow) dev(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deployLimit)
	defer cancel()
	var output bytes.Buffer
	cmd := w.command(ctx, "dev", w.dir)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { cancel(); <-ended }()

	for _, c := range []struct {
		id               figureID
		method, path     string
		body, old, fresh string
	}{
		{devGo, http.MethodGet, "/api/v1/gateway", "", "changed once", "changed twice"},
		{devPython, http.MethodPost, "/api/v1/predict", `{"data": [1]}`, "0.95", "0.55"},
	} {
		get := func() (string, error) { return ask(ctx, w.n, c.method, appHost, c.path, c.body) }
		if err := eventually(ctx, w.n, 2*time.Minute, func() error { _, err := get(); return err }); err != nil {
			return fmt.Errorf("polymesh dev: %w: %s", err, &output)
		}
		if err := w.change(c.id, c.old, c.fresh); err != nil {
			return err
		}
		start := time.Now()
		err := eventually(ctx, w.n, 5*time.Minute, func() error {
			text, err := get()
			if err == nil && !strings.Contains(text, c.fresh) {
				err = fmt.Errorf("the gateway returns %s", text)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("polymesh dev, a change of %s: %w: %s", c.id, err, &output)
		}
		w.results.add(c.id, time.Since(start).Seconds())
	}
	return nil
}

// imageSizes records the size of each service's image on the node: its layers as stored.
func (w *workflow) imageSizes(ctx context.Context) error {
	client, err := w.n.NewClient()
	if err != nil {
		return err
	}
	return eventually(ctx, w.n, 6*time.Minute, func() error {
		nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		found := map[language]float64{}
		for _, i := range nodes.Items[0].Status.Images {
			for _, l := range languages {
				if strings.Contains(strings.Join(i.Names, " "), "/"+l.Service+":") {
					found[l] = float64(i.SizeBytes) / 1e6
				}
			}
		}
		if len(found) < len(languages) {
			return fmt.Errorf("the node has the images of %d services of %d", len(found), len(languages))
		}
		for l, size := range found {
			w.results.add(l.figure("image"), size)
		}
		return nil
	})
}

// meshes are the variants with and without sidecars.
var meshes = []struct{ name, injection string }{{"on", "enabled"}, {"off", "disabled"}}

// languageRate is a rate that a service of each language can handle on one core with its sidecar, in requests per second.
const languageRate = 50

// languages measures requests from a pod outside the mesh through the gateway to one pod of each service, with and without
// the mesh. CPU limits are removed, because they differ between services.
func (w *workflow) languages(ctx context.Context) error {
	if err := w.importArchives(ctx, w.n, "bench/load.tar"); err != nil {
		return err
	}
	var manifests strings.Builder
	if err := template.Must(template.New("languages.yaml").Parse(languageManifests)).Execute(&manifests, languages); err != nil {
		return err
	}
	if err := apply(ctx, w.n, manifests.String()); err != nil {
		return err
	}
	if err := polymesh(ctx, w.n, "kubectl", "rollout", "status", "-n", loadNamespace, "deployment/languages", "--timeout=120s"); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"delete", "hpa", "--all"},
		// Two of them use HTTP/2 to the sidecar, which the services alone do not support.
		{"delete", "destinationrule", "--all"},
		{"scale", "deployment", "--all", "--replicas=1"},
		{"set", "resources", "deployment", "--all", "--limits=cpu=2"},
	} {
		if err := polymesh(ctx, w.n, append([]string{"kubectl", "-n", appNamespace}, args...)...); err != nil {
			return err
		}
	}
	for _, mesh := range meshes {
		if err := w.setMesh(ctx, mesh.injection); err != nil {
			return err
		}
		for _, l := range languages {
			host := l.Service + ".example.com"
			if err := eventually(ctx, w.n, 2*time.Minute, func() error { return w.alone(ctx, host, l) }); err != nil {
				return fmt.Errorf("%s, mesh %s: %w", l.Service, mesh.name, err)
			}
			target := fmt.Sprintf("GET http://istio-ingressgateway.istio-system/api/v1/chain\nHost: %s\n", host)
			send := func(duration time.Duration, how ...string) (*attackReport, error) {
				return attack(ctx, w.n, "languages", target, duration, how...)
			}
			// The first requests open connections, and a JVM compiles.
			if _, err := send(w.load/2, fmt.Sprintf("-rate=%d", languageRate)); err != nil {
				return fmt.Errorf("%s, mesh %s, first requests: %w", l.Service, mesh.name, err)
			}
			paced, err := send(w.load, fmt.Sprintf("-rate=%d", languageRate))
			if err != nil {
				return fmt.Errorf("%s, mesh %s: %w", l.Service, mesh.name, err)
			}
			w.results.add(l.figure("p50 "+mesh.name), paced.Latencies.P50/1e6)
			w.results.add(l.figure("p99 "+mesh.name), paced.Latencies.P99/1e6)
			most, err := send(w.load, "-rate=0", "-max-workers="+connections)
			if err != nil {
				return fmt.Errorf("%s, mesh %s, maximum rate: %w", l.Service, mesh.name, err)
			}
			w.results.add(l.figure("most "+mesh.name), most.Throughput)
		}
	}
	return nil
}

// alone checks that only the service itself handles requests to a host.
func (w *workflow) alone(ctx context.Context, host string, l language) error {
	text, err := ask(ctx, w.n, http.MethodGet, host, "/api/v1/chain", "")
	if err != nil {
		return err
	}
	var answer struct {
		Chain []struct{ Service string }
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil || len(answer.Chain) != 1 || answer.Chain[0].Service != l.Service {
		return fmt.Errorf("%s returned %s", host, text)
	}
	return nil
}

// setMesh restarts the services' pods, with or without sidecars, and waits until only the new ones are left.
func (w *workflow) setMesh(ctx context.Context, injection string) error {
	kubectl := func(args ...string) error {
		return polymesh(ctx, w.n, append([]string{"kubectl", "-n", appNamespace}, args...)...)
	}
	if err := errors.Join(
		kubectl("label", "namespace", appNamespace, "istio-injection="+injection, "--overwrite"),
		kubectl("rollout", "restart", "deployment"),
	); err != nil {
		return err
	}
	for _, l := range languages {
		if err := kubectl("rollout", "status", "deployment/"+l.Service, "--timeout=300s"); err != nil {
			return err
		}
	}
	client, err := w.n.NewClient()
	if err != nil {
		return err
	}
	return eventually(ctx, w.n, 3*time.Minute, func() error {
		pods, err := client.CoreV1().Pods(appNamespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) != len(languages) {
			err = fmt.Errorf("%s has %d pods", appNamespace, len(pods.Items))
		}
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			_, injected := pod.Annotations["sidecar.istio.io/status"]
			if injected != (injection == "enabled") {
				return fmt.Errorf("%s has a sidecar: %v", pod.Name, injected)
			}
		}
		return nil
	})
}

// deployRows and the others are for the report.
var deployRows = []row{
	{deployCold, "deploy, nothing built: five images, with what they download", "s", "", ""},
	{deployWarm, "deploy again, nothing changed", "s", "", ""},
	{deployLine, "deploy after a changed line in go-service", "s", "", ""},
	{devGo, "dev: from a save in go-service to the gateway's answer", "s", "", ""},
	{devPython, "dev: from a save in fastapi-service to the gateway's answer", "s", "", ""},
}

func languageMatrix() matrix {
	m := matrix{heads: []string{
		"service", "image, MB", "p50, ms: mesh", "no mesh", "p99, ms: mesh", "no mesh", "answers per second at most: mesh", "no mesh",
	}}
	for _, l := range languages {
		ids := []figureID{l.figure("image")}
		for _, what := range []string{"p50 ", "p99 ", "most "} {
			for _, mesh := range meshes {
				ids = append(ids, l.figure(what+mesh.name))
			}
		}
		m.lines = append(m.lines, line{l.Service + " (" + l.name + ")", ids})
	}
	return m
}
