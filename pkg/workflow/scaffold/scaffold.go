// Package scaffold creates new projects and services: the guide's tree, with services in five languages that build, have their
// own tests, manifests and a route, and can be deployed by `polymesh deploy` without changes.
//
// It owns the templates. They are complete: templates/services has five services named service-name that can be built,
// tested and linted in place. Generated files differ only in the words that render replaces. pkg/command requests a Plan,
// which changes nothing, and then writes it.
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

// Language is a programming language for services, with the resources of a pod: a JVM needs more than a Rust program.
type Language struct {
	Name  string
	About string // short, for help and shell completion

	memoryRequest, cpuRequest, memoryLimit, cpuLimit string
}

// Languages returns all languages, by name.
func Languages() []Language {
	return []Language{
		{"go", "Go's own net/http, a static program", "32Mi", "50m", "128Mi", "500m"},
		{"java", "Java 17 with Spring Boot", "384Mi", "200m", "640Mi", "1"},
		{"node", "Node.js 20, without a framework", "64Mi", "50m", "192Mi", "500m"},
		{"python", "Python 3.11 with FastAPI", "96Mi", "100m", "256Mi", "500m"},
		{"rust", "Rust with axum, a static program", "32Mi", "50m", "128Mi", "500m"},
	}
}

// LanguageNames returns the values of --lang.
func LanguageNames() []string {
	var names []string
	for _, l := range Languages() {
		names = append(names, l.Name)
	}
	return names
}

func language(name string) (Language, error) {
	if name == "" {
		return Language{}, fmt.Errorf("set the service's language with --lang: %s", strings.Join(LanguageNames(), ", "))
	}
	all := Languages()
	if i := slices.IndexFunc(all, func(l Language) bool { return l.Name == name }); i >= 0 {
		return all[i], nil
	}
	return Language{}, fmt.Errorf("--lang %q is not one of %s", name, strings.Join(LanguageNames(), ", "))
}

// Port is the port of every new service.
const Port = 8080

// Service is a new service.
type Service struct {
	Name     string `json:"name"`
	Language string `json:"language"`
	Path     string `json:"path"` // of its route
}

// ProjectOptions are the options of a new project.
type ProjectOptions struct {
	// Name defaults to the folder's name.
	Name string
	// Host is the host that the gateway accepts, by default NAME.example.com.
	Host string
	// Languages each get a service named LANGUAGE-service.
	Languages []string
}

// NewProject plans a project in dir, which need not exist.
func NewProject(dir string, o ProjectOptions) (*Plan, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	name, advice := o.Name, "choose another one"
	if name == "" {
		name, advice = filepath.Base(dir), "choose another folder, or set the name with --name"
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

// ServiceOptions are the options of a new service besides its name and language.
type ServiceOptions struct {
	// Gateway is the service's Gateway, as written in a VirtualService, and Host its host. Both default to the
	// project's.
	Gateway, Host string
}

// NewService plans a service in an existing project.
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
	gateway, host, err := findGateway(in, objects, namespace, o)
	if err != nil {
		return nil, err
	}
	p := &Plan{Dir: in.Dir, Project: in.Name, Host: host}
	if err := p.addService(name, l, []string{"project-name", in.Name, "project-host", host, "gateway-name", gateway}); err != nil {
		return nil, err
	}
	if s, ok := in.Service(name); ok && filepath.Clean(s.Context) != filepath.Join("services", name) {
		return nil, fmt.Errorf("service %s already exists in %s: choose another name", name, s.Context)
	}
	if err := p.fits(in, objects, namespace); err != nil {
		return nil, err
	}
	if err := p.describe(name); err != nil {
		return nil, err
	}
	return p, p.compare()
}

// checkName rejects names that Kubernetes would reject later: the name of a Service is part of a DNS name (RFC 1035).
func checkName(what, name, advice string) error {
	if problems := validation.IsDNS1035Label(name); len(problems) > 0 {
		return fmt.Errorf("%q is not a valid %s name: use lowercase letters, digits and -, a letter first, at most %d characters; %s", name, what, validation.DNS1035LabelMaxLength, advice)
	}
	return nil
}

func checkHost(host string) error {
	if len(validation.IsDNS1123Subdomain(strings.TrimPrefix(host, "*."))) > 0 || net.ParseIP(host) != nil {
		return fmt.Errorf("--host %q is not a host name, such as shop.example.com", host)
	}
	return nil
}

// findGateway returns the Gateway through which requests reach the project, and the host.
func findGateway(in *project.Project, objects []project.Object, namespace string, o ServiceOptions) (gateway, host string, err error) {
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
		return "", "", fmt.Errorf("the project has the Gateways %s: select one with --gateway", strings.Join(names, ", "))
	case gateway == "":
		return "", "", errors.New("the project has no such Gateway: set the Gateway (NAME, or NAMESPACE/NAME) with --gateway and the host with --host")
	case o.Host != "":
		return gateway, o.Host, nil
	}
	hosts := hosts(found)
	if len(hosts) == 0 {
		return "", "", fmt.Errorf("%s: Gateway %s serves no host over HTTP: set the service's host with --host", found.At("spec", "servers"), gateway)
	}
	// Prefer a name to a wildcard.
	if i := slices.IndexFunc(hosts, func(h string) bool { return !strings.Contains(h, "*") }); i > 0 {
		return gateway, hosts[i], nil
	}
	return gateway, hosts[0], nil
}

// hosts returns the hosts that a Gateway serves over HTTP or HTTPS.
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
			// In NAMESPACE/HOST, the namespace restricts which VirtualServices may bind to it.
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

// notAModule is the suffix of template files that would make the go command treat the folder as a module.
const notAModule = ".template"

// add plans the files of a template folder, with placeholders replaced by words.
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

// fits rejects files that the project would not deploy, and objects that already exist in another file.
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
