package deploy

import (
	"fmt"

	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// Inputs visits the files and folders on this machine that a deploy of the project reads, each folder before its content, and the
// places where it searches for others. Paths are absolute and may not exist. It uses the same walks as deploy itself.
func Inputs(p *project.Project, visit func(path string)) error {
	for _, path := range []string{project.File, "services", "k8s", "istio"} {
		visit(p.Path(path))
	}
	for _, s := range p.Secrets {
		for _, from := range s.Data {
			if from.File != "" {
				visit(p.Path(from.File))
			}
		}
	}
	if err := p.WalkManifests(func(path string, _ bool) { visit(path) }); err != nil {
		return err
	}
	for _, s := range p.Services {
		source := source(p, s)
		visit(source.Context) // a link may change its target
		err := source.Walk(func(f image.File) error {
			visit(f.Path)
			return nil
		})
		if err != nil {
			return fmt.Errorf("service %s: %w", s.Name, err)
		}
	}
	return nil
}
