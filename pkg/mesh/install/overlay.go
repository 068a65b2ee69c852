package install

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/values"
	"istio.io/istio/pkg/version"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// Images names where Istio's images come from and at which tag.
type Images struct{ Hub, Tag string }

// BuiltIn returns the images that this build ships. The build sets them in Istio's own version package, which has the defaults of
// Istio's installer (istio.io/istio/pkg/version, buildHub and buildVersion).
func BuiltIn() Images {
	return Images{Hub: version.DockerInfo.Hub, Tag: version.DockerInfo.Tag}
}

// Stamped reports whether the build set its images. A plain `go build` does not.
func (i Images) Stamped() bool {
	return i.Hub != "" && i.Hub != "unknown" && i.Tag != "" && i.Tag != "unknown"
}

// Serve reports whether an installation with this hub and tag runs these images: from their own hub, or mirrored with their own
// tag. All others are Istio's images, with Istio's own Envoy.
func (i Images) Serve(hub, tag string) bool {
	return i.Stamped() && (hub == i.Hub || tag == i.Tag)
}

// Overlay returns the values that are merged between a profile and the user's own files and --set flags, as an IstioOperator, or nil
// if the result would not run images: Istio's own images get Istio's own values. files and sets are the user's, in
// istioctl's syntax.
func Overlay(images Images, files, sets []string) ([]byte, error) {
	merged, err := render.MergeInputs(files, sets, nil)
	if err != nil {
		return nil, fmt.Errorf("merge Istio's settings: %w", err)
	}
	hub, _ := merged.GetPath("spec.values.global.hub")
	tag, _ := merged.GetPath("spec.values.global.tag")
	if !images.Serve(fmt.Sprint(hub), fmt.Sprint(tag)) {
		return nil, nil
	}

	env := map[string]any{}
	for k, v := range dialect.IstiodEnv() {
		env[k] = v
	}
	// With 0, the chart does not set the number of replicas; see scaler.
	pilot := map[string]any{"env": env, "replicaCount": 0}
	_, hpa := merged.GetPath("spec.components.pilot.k8s.hpaSpec")
	// Without a profile of values, the charts request 500m and 2 GiB for istiod, more than a small node has, and scale it out at 80 %
	// of the request. Profiles of values (demo, stable, ...) set their own.
	if merged.GetPathString("spec.values.profile") == "" && merged.GetPathString("spec.values.global.profile") == "" {
		pilot["resources"] = map[string]any{"requests": map[string]any{"cpu": "100m", "memory": "256Mi"}}
		if !hpa {
			pilot["autoscaleEnabled"] = false
		}
	}
	providers, err := traceProviders(merged)
	if err != nil {
		return nil, err
	}
	overlay := values.Map{
		"apiVersion": "install.istio.io/v1alpha1",
		"kind":       "IstioOperator",
		"spec": map[string]any{
			"values": map[string]any{
				// The images are already in the node's store; there may be no registry.
				"global":         map[string]any{"imagePullPolicy": "IfNotPresent"},
				"pilot":          pilot,
				"gatewayClasses": map[string]any{"istio": gatewayDefaults()},
			},
		},
	}
	if providers != nil {
		if err := overlay.SetPath("spec.values.meshConfig.extensionProviders", providers); err != nil {
			return nil, fmt.Errorf("add the provider of traces to Istio's settings: %w", err)
		}
	}
	return []byte(overlay.YAML()), nil
}

// gatewayDefaults changes what istiod creates for a Gateway of the class istio. Each of these Services would also request the proxy's
// status port. On one address only the first Service, the ingress gateway, can have that port, and servicelb gives a Service all of
// its ports or none. The kubelet probes the pod directly.
func gatewayDefaults() map[string]any {
	return map[string]any{"service": map[string]any{"spec": map[string]any{
		"ports": []any{map[string]any{"port": 15021, "$patch": "delete"}},
	}}}
}

// File is a file in memory, for Istio's installer, which only accepts settings by file name. It is gone when the process ends.
type File struct{ f *os.File }

// NewFile returns a file with the given content.
func NewFile(name string, content []byte) (*File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create a file in memory for %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", name, err)
	}
	return &File{f}, nil
}

// Path returns the file's name; every open reads it from the start.
func (f *File) Path() string { return fmt.Sprintf("/proc/self/fd/%d", f.f.Fd()) }

// Close releases the file.
func (f *File) Close() error { return f.f.Close() }

// Input adds the overlay before the user's files. The returned names are for Istio's installer, and valid until done is called. A
// "-" among files is read from stdin, once.
func Input(images Images, files, sets []string, stdin io.Reader) (names []string, done func(), err error) {
	var open []*File
	done = func() {
		for _, f := range open {
			f.Close()
		}
	}
	add := func(name string, content []byte) (string, error) {
		f, err := NewFile(name, content)
		if err != nil {
			return "", err
		}
		open = append(open, f)
		return f.Path(), nil
	}
	names = append(names, files...)
	for i, name := range names {
		if name != "-" {
			continue
		}
		content, err := io.ReadAll(stdin)
		if err != nil {
			done()
			return nil, nil, fmt.Errorf("read settings from standard input: %w", err)
		}
		if names[i], err = add("stdin", content); err != nil {
			done()
			return nil, nil, err
		}
		break
	}
	overlay, err := Overlay(images, names, sets)
	if err != nil {
		done()
		return nil, nil, err
	}
	if overlay == nil {
		return names, done, nil
	}
	name, err := add("polymesh-overlay", overlay)
	if err != nil {
		done()
		return nil, nil, err
	}
	return append([]string{name}, names...), done, nil
}
