// Package scaffold makes new projects and services: the guide's tree, and in it services in five languages that build,
// have tests of their own, manifests and a route, so that `polymesh deploy` takes them as they are.
//
// It owns the templates. Each is what it makes, down to the last file: templates/services has five services that are
// called service-name and can be built, tested and linted where they stand. New files differ from them only in the words
// of render. pkg/command asks for a Plan, which has changed nothing yet, and has it written.
package scaffold

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

//go:embed all:templates
var templates embed.FS

// Language is what a service can be written in. What a pod of it takes is part of it: a JVM needs more than a Rust program.
type Language struct {
	Name  string
	About string // a few words, for help and shell completion

	memoryRequest, cpuRequest, memoryLimit, cpuLimit string
}

// Languages are all of them, by name.
func Languages() []Language {
	return []Language{
		{"go", "Go's own net/http, a static program", "32Mi", "50m", "128Mi", "500m"},
		{"java", "Java 17 with Spring Boot", "384Mi", "200m", "640Mi", "1"},
		{"node", "Node.js 20, without a framework", "64Mi", "50m", "192Mi", "500m"},
		{"python", "Python 3.11 with FastAPI", "96Mi", "100m", "256Mi", "500m"},
		{"rust", "Rust with axum, a static program", "32Mi", "50m", "128Mi", "500m"},
	}
}

// LanguageNames are what --lang takes.
func LanguageNames() []string {
	var names []string
	for _, l := range Languages() {
		names = append(names, l.Name)
	}
	return names
}

func language(name string) (Language, error) {
	if name == "" {
		return Language{}, fmt.Errorf("say with --lang what the service is written in: %s", strings.Join(LanguageNames(), ", "))
	}
	all := Languages()
	if i := slices.IndexFunc(all, func(l Language) bool { return l.Name == name }); i >= 0 {
		return all[i], nil
	}
	return Language{}, fmt.Errorf("--lang %q is not one of %s", name, strings.Join(LanguageNames(), ", "))
}

// Port is where every new service listens.
const Port = 8080

// Service is a service that is new.
type Service struct {
	Name     string `json:"name"`
	Language string `json:"language"`
	Path     string `json:"path"` // of its route
}

// ProjectOptions are what a new project may have beside its name.
type ProjectOptions struct {
	// Name is the folder's by default.
	Name string
	// Host is what the gateway lets in: NAME.example.com by default.
	Host string
	// Languages each get a service called LANGUAGE-service.
	Languages []string
}

// NewProject plans a project in dir, which need not be there.
func NewProject(dir string, o ProjectOptions) (*Plan, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	name, advice := o.Name, "choose another one"
	if name == "" {
		name, advice = filepath.Base(dir), "choose another folder, or give the name with --name"
	}
	if err := checkName("project", name, advice); err != nil {
		return nil, err
	}
	host := o.Host
	if host == "" {
		host = name + ".example.com"
	}
	if err := checkHost(host); err != nil {
		return nil, err
	}
	p := &Plan{Dir: dir, Project: name, Host: host}
	words := []string{"project-name", name, "project-host", host}
	if err := p.add("templates/project", "", words); err != nil {
		return nil, err
	}
	for _, lang := range o.Languages {
		l, err := language(lang)
		if err != nil {
			return nil, err
		}
		service := l.Name + "-service"
		if slices.ContainsFunc(p.Services, func(s Service) bool { return s.Name == service }) {
			return nil, fmt.Errorf("--lang names %s twice", l.Name)
		}
		if err := p.addService(service, l, append([]string{"gateway-name", name}, words...)); err != nil {
			return nil, err
		}
	}
	return p, p.compare()
}

// ServiceOptions are what a new service may have beside its name and language.
type ServiceOptions struct {
	// Gateway is who lets its requests in, as a VirtualService names it, and Host the host that they are for. Both are the
	// project's by default.
	Gateway, Host string
}

// NewService plans a service of a project that is there.
func NewService(in *project.Project, name, lang string, o ServiceOptions) (*Plan, error) {
	l, err := language(lang)
	if err != nil {
		return nil, err
	}
	if err := checkName("service", name, "choose another one"); err != nil {
		return nil, err
	}
	if o.Host != "" {
		if err := checkHost(o.Host); err != nil {
			return nil, err
		}
	}
	objects, namespace, err := in.Objects()
	if err != nil {
		return nil, err
	}
	gateway, host, err := entrance(in, objects, namespace, o)
	if err != nil {
		return nil, err
	}
	p := &Plan{Dir: in.Dir, Project: in.Name, Host: host}
	if err := p.addService(name, l, []string{"project-name", in.Name, "project-host", host, "gateway-name", gateway}); err != nil {
		return nil, err
	}
	if s, ok := in.Service(name); ok && filepath.Clean(s.Context) != filepath.Join("services", name) {
		return nil, fmt.Errorf("service %s is there already, in %s: choose another name", name, s.Context)
	}
	if err := p.fits(in, objects, namespace); err != nil {
		return nil, err
	}
	if err := p.describe(name); err != nil {
		return nil, err
	}
	return p, p.compare()
}

// checkName refuses what Kubernetes would refuse later: the name of a Service is part of a DNS name (RFC 1035).
func checkName(what, name, advice string) error {
	if problems := validation.IsDNS1035Label(name); len(problems) > 0 {
		return fmt.Errorf("%q cannot be the name of a %s: small letters, digits and -, a letter first, at most %d characters; %s", name, what, validation.DNS1035LabelMaxLength, advice)
	}
	return nil
}

func checkHost(host string) error {
	if len(validation.IsDNS1123Subdomain(strings.TrimPrefix(host, "*."))) > 0 || net.ParseIP(host) != nil {
		return fmt.Errorf("--host %q is not the name of a host, such as shop.example.com", host)
	}
	return nil
}

// entrance is the Gateway that lets requests to the project in, and for which host.
func entrance(in *project.Project, objects []project.Object, namespace string, o ServiceOptions) (gateway, host string, err error) {
	if o.Gateway != "" && o.Host != "" {
		return o.Gateway, o.Host, nil
	}
	var names []string
	var found project.Object
	for _, object := range objects {
		if object.GroupVersionKind().GroupKind() != (schema.GroupKind{Group: "networking.istio.io", Kind: "Gateway"}) {
			continue
		}
		name := object.GetName()
		if n := object.GetNamespace(); n != "" && n != namespace {
			name = n + "/" + name
		}
		names = append(names, name)
		if o.Gateway == "" || o.Gateway == name {
			gateway, found = name, object
		}
	}
	switch {
	case len(names) > 1 && o.Gateway == "":
		return "", "", fmt.Errorf("the project has the Gateways %s: say which one with --gateway", strings.Join(names, ", "))
	case gateway == "":
		return "", "", errors.New("the project has no such Gateway: say with --gateway (NAME, or NAMESPACE/NAME) and --host who lets requests in, and for which host")
	case o.Host != "":
		return gateway, o.Host, nil
	}
	hosts := hosts(found)
	if len(hosts) == 0 {
		return "", "", fmt.Errorf("%s: Gateway %s serves no host over HTTP: say with --host which one the service is for", found.At("spec", "servers"), gateway)
	}
	// A name is better than a pattern.
	if i := slices.IndexFunc(hosts, func(h string) bool { return !strings.Contains(h, "*") }); i > 0 {
		return gateway, hosts[i], nil
	}
	return gateway, hosts[0], nil
}

// hosts are those that a Gateway serves over HTTP or HTTPS.
func hosts(gateway project.Object) []string {
	var found []string
	spec, _ := gateway.Object["spec"].(map[string]any)
	servers, _ := spec["servers"].([]any)
	for _, item := range servers {
		server, _ := item.(map[string]any)
		port, _ := server["port"].(map[string]any)
		protocol, _ := port["protocol"].(string)
		names, _ := server["hosts"].([]any)
		if !slices.Contains([]string{"HTTP", "HTTPS", "HTTP2", "GRPC"}, strings.ToUpper(protocol)) {
			continue
		}
		for _, name := range names {
			// NAMESPACE/HOST says which namespaces may bind to it.
			text := fmt.Sprint(name)
			found = append(found, text[strings.LastIndexByte(text, '/')+1:])
		}
	}
	return found
}

// addService plans a service's source and manifests.
func (p *Plan) addService(name string, l Language, words []string) error {
	words = append([]string{
		"service-name", name,
		"memory-request", l.memoryRequest, "cpu-request", l.cpuRequest, "memory-limit", l.memoryLimit, "cpu-limit", l.cpuLimit,
	}, words...)
	p.Services = append(p.Services, Service{Name: name, Language: l.Name, Path: "/" + name})
	if err := p.add("templates/services/"+l.Name, "services/"+name, words); err != nil {
		return err
	}
	return p.add("templates/manifests", "", words)
}

// notAModule is at the end of a file's name that means something to the go command, which would take it for its own.
const notAModule = ".template"

// add plans the files of a folder of the templates, with words in the place of other words.
func (p *Plan) add(from, to string, words []string) error {
	own := strings.NewReplacer(words...)
	return fs.WalkDir(templates, from, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := templates.ReadFile(name)
		if err != nil {
			return err
		}
		target := path.Join(to, own.Replace(strings.TrimPrefix(name, from+"/")))
		p.Files = append(p.Files, File{Path: strings.TrimSuffix(target, notAModule), text: []byte(own.Replace(string(text)))})
		return nil
	})
}

// fits refuses what the project would not deploy, and objects that it has already in another file.
func (p *Plan) fits(in *project.Project, objects []project.Object, namespace string) error {
	for _, f := range p.Files {
		if strings.HasPrefix(f.Path, "services/") {
			continue
		}
		made, err := project.Decode(f.Path, f.text)
		if err != nil {
			return err
		}
		for _, object := range made {
			for _, other := range objects {
				same := other.GroupVersionKind().GroupKind() == object.GroupVersionKind().GroupKind() && other.GetName() == object.GetName() &&
					(other.GetNamespace() == "" || other.GetNamespace() == namespace)
				if same && filepath.ToSlash(other.File) != f.Path {
					return fmt.Errorf("%s is already at %s: choose another name", object.ID(), other.At())
				}
			}
		}
	}
	return nil
}
