//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// walked are the pages that a new user reads, in order.
var walked = []string{"README.md", "docs/start/install.md", "docs/start/first-steps.md"}

// adapted are the commands of walked that do not run as they stand, each with what runs in its place and why. A command that is
// neither here nor works fails the test, and so does a line here that no page has.
var adapted = []struct{ command, instead, why string }{
	{"make up", "", "the node under test is what `make up` made"},
	{"make down", "", "so is what it undoes; TestUp does both"},
	{"make", "", "dist/polymesh is what the test runs"},
	{"make test", "", "this is it"},
	{"make conformance", "", "a suite of its own"},
	{"make lint", "", "a step of its own"},
	{"make help", `make -C "$TOP" help`, "the test's folder is another one"},
	{"install dist/polymesh /usr/local/bin/", `install "$PROGRAM" "$BIN/polymesh"`, "the machine's own programs stay as they are"},
	{"sudo dist/polymesh install --now", `install -m 0755 "$PROGRAM" "$BIN/polymesh"`, "the node has no systemd; the machine's own programs stay as they are"},
	{"sudo dist/polymesh install --now --mesh-profile demo --tls-san api.example.com", "polymesh install --help", "as above"},
	{"sudo dist/polymesh install --no-service", "polymesh install --no-service --dry-run", "as above"},
	{"sudo ./polymesh install --now", "polymesh install --help", "as above"},
	{"sudo polymesh uninstall", "polymesh uninstall --dry-run", "as above"},
	{"polymesh server --mesh-profile demo &", "polymesh server --mesh-profile demo --help", "the node's server runs, with that profile"},
	{"sudo polymesh server", "polymesh server --help", "as above"},
	{"apt-get install buildah slirp4netns", "dpkg-query --show buildah slirp4netns", "the test's machine has them"},
	{`sudo install -m 0600 -o "$USER" /etc/polymesh/polymesh.yaml ~/.kube/polymesh.yaml`,
		`install -m 0600 -o "$(id -un)" "$KUBECONFIG" ~/.kube/polymesh.yaml`, "the node's kubeconfig has another path"},
	{"polymesh deploy examples/polyglot/guide", `polymesh deploy "$TOP/examples/polyglot/guide"`, "the test's folder is another one"},
	{`curl $gateway/api/v1/call-go -H "Host: api.example.com"`,
		`curl --noproxy '*' -sSf --retry 30 --retry-delay 1 --retry-all-errors $gateway/api/v1/call-go -H "Host: api.example.com"`, "the test's machine may have a proxy, and fails for a status of an error"},
	{`curl $gateway/api/v1/predict -H "Host: api.example.com" -H "Content-Type: application/json" -d '{"data": [1.0, 2.0, 3.0]}'`,
		`curl --noproxy '*' -sSf $gateway/api/v1/predict -H "Host: api.example.com" -H "Content-Type: application/json" -d '{"data": [1.0, 2.0, 3.0]}'`, "as above"},
}

// TestWalk runs what README.md and docs/start say, from the first line to the last, out of the pages themselves.
func TestWalk(t *testing.T) {
	n := app(t)
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bin, home := filepath.Join(dir, "bin"), filepath.Join(dir, "home")
	for _, d := range []string{bin, home} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	env := exampleImages(t, "bases")
	temp := filepath.Join(top, ".build", "polyglot", "tmp")
	if err := os.MkdirAll(temp, 0o755); err != nil {
		t.Fatal(err)
	}
	env = append(env, "TMPDIR="+temp)
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	// The node's network reaches no package registry: see docs/deploy/new.md.
	fillCaches(t, n, "go", "python")
	// Without a registry an app comes as an archive.
	if err := os.Link(filepath.Join(top, ".build", "polyglot", "go-service-1.0.0.tar"), filepath.Join(dir, "app.tar")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Kubectl(t, "delete", "namespace", "shop", "demo", "--ignore-not-found", "--wait=false") })

	used := map[string]bool{}
	for _, page := range walked {
		text, err := os.ReadFile(filepath.Join(top, page))
		if err != nil {
			t.Fatal(err)
		}
		var script strings.Builder
		script.WriteString("set -euo pipefail\n")
		commands := 0
		for _, command := range commandsOf(string(text)) {
			run, why := command, ""
			for _, a := range adapted {
				if a.command == command {
					run, why, used[command] = a.instead, a.why, true
				}
			}
			if why != "" {
				t.Logf("%s: %s: %q instead: %s", page, command, run, why)
			}
			if run == "" {
				continue
			}
			commands++
			fmt.Fprintf(&script, "printf '%%s\\n' %s >&2\n%s\n", quoted("$ "+run), strings.ReplaceAll(run, "sudo ", ""))
		}
		if commands == 0 {
			t.Errorf("%s has no command", page)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		cmd := n.Command(ctx, "bash", "-c", script.String())
		cmd.Dir = dir
		cmd.Env = append(cmd.Env, append(env, "HOME="+home, "USER=root", "TOP="+top, "PROGRAM="+program, "BIN="+bin, "PATH="+bin+":"+os.Getenv("PATH"))...)
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("%s does not work as it is written: %v\n%s", page, err, out)
		}
		t.Logf("%s: %d commands\n%s", page, commands, out)
	}
	for _, a := range adapted {
		if !used[a.command] {
			t.Errorf("no page contains %q any more: remove it from the table", a.command)
		}
	}
	// What the README promises at its end.
	for _, path := range []string{"/go-service", "/python-service"} {
		n.Eventually(t, time.Minute, func() (bool, string) {
			status, text, err := ask(n.HTTP(false), n, http.MethodGet, "shop.example.com", path, nil)
			return err == nil && status == http.StatusOK, fmt.Sprintf("%s: %d %s %v", path, status, text, err)
		})
	}
}

// TestNextOfMakeUp runs what `make up` prints under "Next".
func TestNextOfMakeUp(t *testing.T) {
	n := app(t)
	_, next, ok := strings.Cut(shared.output, "\nNext:\n")
	if !ok {
		t.Fatalf("make up does not print what is next:\n%s", shared.output)
	}
	t.Cleanup(func() {
		n.Kubectl(t, "set", "image", "deployment/fastapi-service", "fastapi=my-registry/fastapi-service:1.0.0", "-n", appNamespace)
		n.WaitRollout(t, appNamespace, "deployment/fastapi-service")
	})
	var script strings.Builder
	script.WriteString("set -euo pipefail\n")
	ran := 0
	for command := range strings.Lines(next) {
		command, _, _ = strings.Cut(strings.TrimSpace(command), " # ")
		command = strings.TrimSpace(command)
		if command == "" || command == "make down" {
			continue
		}
		ran++
		if strings.Contains(command, " port-forward ") {
			// It runs until it is ended; that it works shows in an answer.
			command += " >/dev/null & forward=$!\ncurl --noproxy '*' -sSf --retry 30 --retry-delay 1 --retry-connrefused -H 'Host: " + appHost + "' http://localhost:8080/api/v1/call-go\nkill $forward"
		}
		script.WriteString(command + "\n")
	}
	if ran < 5 {
		t.Errorf("only %d commands under Next:\n%s", ran, next)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := n.Command(ctx, "bash", "-c", script.String()).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\nof\n%s", err, out, &script)
	}
	n.WaitRollout(t, appNamespace, "deployment/fastapi-service")
	n.Eventually(t, time.Minute, func() (bool, string) {
		image := n.Kubectl(t, "get", "pods", "-n", appNamespace, "-l", "app=fastapi-service", "-o", "jsonpath={.items[*].spec.containers[?(@.name=='fastapi')].image}")
		return image != "" && !strings.Contains(image, ":1.0.0"), "the pods run " + image
	})
}

// commandsOf are the lines of a page's fenced blocks that have no language: commands. One that ends in a backslash continues in the
// next, and what follows a # is for people. Blocks of a file (a unit) begin with [.
func commandsOf(page string) []string {
	var commands []string
	open, skip, first := false, false, false
	var line string
	for text := range strings.Lines(page) {
		text = strings.TrimSpace(text)
		switch {
		case strings.HasPrefix(text, "```"):
			open, skip, first = !open, text != "```", true
			continue
		case !open || skip || text == "":
			continue
		case first && strings.HasPrefix(text, "["):
			skip = true
			continue
		}
		first = false
		text, _, _ = strings.Cut(text, " # ")
		text = strings.TrimSpace(text)
		if before, ok := strings.CutSuffix(text, `\`); ok {
			line += before
			continue
		}
		commands = append(commands, line+text)
		line = ""
	}
	return commands
}

func quoted(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// Pages that a walk cannot run, because they are about other machines, are still made of commands that exist.
func TestPagesNameRealCommands(t *testing.T) {
	ownNodes(t, 0)
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"docs/deploy/new.md", "docs/operate/registries.md"} {
		text, err := os.ReadFile(filepath.Join(top, page))
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range commandsOf(string(text)) {
			fields := strings.Fields(command)
			if len(fields) < 2 || fields[0] != "polymesh" {
				continue
			}
			var path []string
			for _, field := range fields[1:] {
				if strings.HasPrefix(field, "-") || len(path) == 2 {
					break
				}
				path = append(path, field)
			}
			cmd := exec.CommandContext(t.Context(), program, append(path, "--help")...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %s: %v: %s", page, command, err, out)
			}
		}
	}
}
