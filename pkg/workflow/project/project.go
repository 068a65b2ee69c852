// Package project reads the input of `polymesh deploy`: a folder with a polymesh.yaml, or just the guide's tree
// (services/, k8s/, istio/).
//
// It owns the format of polymesh.yaml (schema.json, which editors can use too) and knows the file and line of each object
// in a manifest. It does not access a cluster and does not build. pkg/command loads a project and passes it
// to pkg/workflow/image and pkg/workflow/deploy.
package project

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/text/language"
	"golang.org/x/text/message"
	"sigs.k8s.io/yaml"
)

// File is the name of the project file.
const File = "polymesh.yaml"

// Schema is the JSON schema of polymesh.yaml (draft 2020-12).
//
//go:embed schema.json
var Schema []byte

// Project is a checked polymesh.yaml with every default filled in. Paths are relative to Dir.
type Project struct {
	Dir  string `json:"-"`
	Name string `json:"name"`
	// ID distinguishes the project from others with the same name, wherever it is deployed from; see Origin.
	ID string `json:"id,omitempty"`
	// Namespace is the namespace of objects that do not set one.
	Namespace string `json:"namespace"`
	// Registry is where built images are pushed; empty loads them into the node on this machine.
	Registry string `json:"registry,omitempty"`
	// Manifests are files and folders, in reading order.
	Manifests []string      `json:"manifests"`
	Services  []Service     `json:"services"`
	Secrets   []Secret      `json:"secrets,omitempty"`
	Timeout   time.Duration `json:"-"`
}

// Service is an image that is built from a folder. Containers whose image has this name, with any tag, use the
// built image.
type Service struct {
	Name       string            `json:"name"`
	Context    string            `json:"context"`
	Dockerfile string            `json:"dockerfile"` // relative to Context
	Image      string            `json:"image"`      // without a tag
	Args       map[string]string `json:"args,omitempty"`
	Target     string            `json:"target,omitempty"`
	// Mounts are available to the build but not kept in the image: HOST:PATH, read-only.
	Mounts []string `json:"mounts,omitempty"`
	// Network is what a build can reach: one of image.Networks. Settings are the package managers, of image.Clients, whose
	// settings on this machine the build can read. Both default to the least access.
	Network  string   `json:"network,omitempty"`
	Settings []string `json:"settings,omitempty"`
}

// Secret is a Secret in the project's namespace whose values are never part of a manifest.
type Secret struct {
	Name string                 `json:"name"`
	Type string                 `json:"type,omitempty"` // Kubernetes' types; Opaque by default
	Data map[string]SecretValue `json:"data"`
}

// SecretValue is the source of a value; exactly one field is set.
type SecretValue struct {
	Env  string `json:"env,omitempty"`  // an environment variable
	File string `json:"file,omitempty"` // a file's unmodified contents
}

// description is polymesh.yaml as written.
type description struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Project
	Timeout string `json:"timeout,omitempty"`
}

// Find returns the folder of the project that contains dir: the nearest one with a polymesh.yaml, at or above dir.
func Find(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for at := dir; ; at = filepath.Dir(at) {
		_, err := os.Stat(filepath.Join(at, File))
		if err == nil {
			return at, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("neither %s nor a folder above it has a %s: create a project (polymesh new project NAME), or specify its folder", dir, File)
		}
	}
}

// Load reads the project in dir. Errors contain the file, the field and the expected value.
func Load(dir string) (*Project, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s does not exist: specify the folder with %s, or with services/ and k8s/", dir, File)
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%s is a file: specify the folder with %s, or with services/ and k8s/", dir, File)
	}
	p := &Project{Dir: dir, Timeout: 5 * time.Minute}
	text, err := os.ReadFile(filepath.Join(dir, File))
	switch {
	case err == nil:
		if p, err = parse(dir, text); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, File), err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if err := p.complete(); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return p, nil
}

func parse(dir string, text []byte) (*Project, error) {
	var value any
	if err := yaml.Unmarshal(text, &value); err != nil {
		return nil, err
	}
	if err := validate(value); err != nil {
		return nil, err
	}
	var d description
	if err := yaml.UnmarshalStrict(text, &d); err != nil {
		return nil, err
	}
	p := &d.Project
	p.Dir, p.Timeout = dir, 5*time.Minute
	if d.Timeout != "" {
		var err error
		if p.Timeout, err = time.ParseDuration(d.Timeout); err != nil {
			return nil, fmt.Errorf("timeout: %w", err)
		}
	}
	return p, nil
}

// validate checks a decoded polymesh.yaml against the schema.
func validate(value any) error {
	schema, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema))
	if err != nil {
		return fmt.Errorf("read the schema: %w", err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("schema.json", schema); err != nil {
		return fmt.Errorf("read the schema: %w", err)
	}
	compiled, err := c.Compile("schema.json")
	if err != nil {
		return fmt.Errorf("read the schema: %w", err)
	}
	err = compiled.Validate(value)
	var invalid *jsonschema.ValidationError
	if !errors.As(err, &invalid) {
		return err
	}
	var found []string
	leaves(invalid, func(e *jsonschema.ValidationError) {
		at := strings.Join(e.InstanceLocation, ".")
		if at == "" {
			at = "the file"
		}
		found = append(found, at+": "+e.ErrorKind.LocalizedString(message.NewPrinter(language.English)))
	})
	slices.Sort(found)
	return errors.New(strings.Join(slices.Compact(found), "; "))
}

func leaves(e *jsonschema.ValidationError, visit func(*jsonschema.ValidationError)) {
	if len(e.Causes) == 0 {
		visit(e)
	}
	for _, cause := range e.Causes {
		leaves(cause, visit)
	}
}

// longestName is the maximum length of project and namespace names, in characters: that of a label value.
const longestName = 63

var notInName = regexp.MustCompile(`[^a-z0-9-]+`)

// complete fills in defaults: the guide's folders.
func (p *Project) complete() error {
	if p.Name == "" {
		p.Name = strings.Trim(notInName.ReplaceAllString(strings.ToLower(filepath.Base(p.Dir)), "-"), "-")
		if p.Name == "" || len(p.Name) > longestName {
			return fmt.Errorf("the folder's name is not usable as the project's name: set one in %s (name:)", File)
		}
	}
	if p.Services == nil {
		if err := p.findServices(); err != nil {
			return err
		}
	}
	for i := range p.Services {
		s := &p.Services[i]
		if s.Context == "" {
			s.Context = filepath.Join("services", s.Name)
		}
		if s.Dockerfile == "" {
			s.Dockerfile = "Dockerfile"
		}
		dockerfile := filepath.Join(p.Dir, s.Context, s.Dockerfile)
		if _, err := os.Stat(dockerfile); err != nil {
			return fmt.Errorf("service %s: %s does not exist: correct its context or dockerfile in %s", s.Name, dockerfile, File)
		}
		for _, other := range p.Services[:i] {
			if other.Name == s.Name {
				return fmt.Errorf("two services are named %s", s.Name)
			}
		}
	}
	if p.Manifests == nil {
		for _, folder := range []string{"k8s", "istio"} {
			if info, err := os.Stat(filepath.Join(p.Dir, folder)); err == nil && info.IsDir() {
				p.Manifests = append(p.Manifests, folder)
			}
		}
	}
	if len(p.Manifests) == 0 {
		return fmt.Errorf("nothing to deploy: there is neither k8s/ nor istio/, and no manifests in %s", File)
	}
	return nil
}

// findServices adds each folder in services/ that has a Dockerfile.
func (p *Project) findServices() error {
	entries, err := os.ReadDir(filepath.Join(p.Dir, "services"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, err := os.Stat(filepath.Join(p.Dir, "services", entry.Name(), "Dockerfile")); err == nil {
			p.Services = append(p.Services, Service{Name: entry.Name()})
		}
	}
	return nil
}

// Service returns the service with that name.
func (p *Project) Service(name string) (Service, bool) {
	i := slices.IndexFunc(p.Services, func(s Service) bool { return s.Name == name })
	if i < 0 {
		return Service{}, false
	}
	return p.Services[i], true
}

// Path makes a path from polymesh.yaml absolute.
func (p *Project) Path(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(p.Dir, path)
}
