package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/imagestore"
)

// oldRefusal is what earlier versions wrote into the user's folder for the shipped images.
const oldRefusal = `# Written by polymesh at each start. The images of this name come with Polymesh and are never pulled.
# To pull them from a mirror, replace the whole file.
server = "https://` + imagestore.ShippedRegistry + `"
capabilities = ["push"]
`

// header is the first line of each file, by which ours are known.
const header = "# Written by polymesh at each start. A folder of the same name in certs.d is used in its place.\n"

// fallback is where containerd goes on when this component has no image.
type fallback int

const (
	// theRegistry is the registry in the image's name, which containerd adds itself (ConfigureHosts in core/remotes/docker/config).
	theRegistry fallback = iota
	// noRegistry is none: the registry is there for pushing only, so that a missing image is an error.
	noRegistry
)

// hosts returns containerd's configuration (https://github.com/containerd/containerd/blob/main/docs/hosts.md): this component first.
func (r *Registry) hosts(then fallback) string {
	here := fmt.Sprintf("http://%s", r.local.Addr())
	var b strings.Builder
	b.WriteString(header)
	if then == noRegistry {
		fmt.Fprintf(&b, "server = %q\ncapabilities = [\"push\"]\n", here)
	}
	fmt.Fprintf(&b, "[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n[host.%q.header]\nAuthorization = %q\n", here, here, r.authorization())
	return b.String()
}

// writeHosts names this component to containerd, which reads the files for each pull. The images that came with Polymesh are never
// pulled from their domain's current owner, or from a mirror of all registries.
func (r *Registry) writeHosts() error {
	old := filepath.Join(r.opts.UserHostsDir, imagestore.ShippedRegistry, "hosts.toml")
	if text, err := os.ReadFile(old); err == nil && string(text) == oldRefusal {
		if err := os.RemoveAll(filepath.Dir(old)); err != nil {
			return err
		}
	}
	want := map[string]string{imagestore.ShippedRegistry: r.hosts(noRegistry), "_default": r.hosts(theRegistry)}
	for _, name := range r.mirrors.closed() {
		want[name] = r.hosts(noRegistry)
	}
	if err := os.MkdirAll(r.opts.HostsDir, 0o700); err != nil {
		return err
	}
	for name, text := range want {
		dir := filepath.Join(r.opts.HostsDir, hostsFolder(name))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := atomicfile.Write(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := r.removeHosts(want); err != nil {
		return err
	}
	notice := ""
	if has, err := exists(filepath.Join(r.opts.UserHostsDir, "_default")); err != nil || has {
		notice = fmt.Sprintf("containerd takes no images from other nodes: %s is used in the place of Polymesh's own", filepath.Join(r.opts.UserHostsDir, "_default"))
	}
	r.notice.Store(&notice)
	return nil
}

// removeHosts removes the files of registries that are not in registries.yaml any more.
func (r *Registry) removeHosts(want map[string]string) error {
	entries, err := os.ReadDir(r.opts.HostsDir)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for name := range want {
		keep[hostsFolder(name)] = true
	}
	for _, e := range entries {
		file := filepath.Join(r.opts.HostsDir, e.Name(), "hosts.toml")
		if keep[e.Name()] {
			continue
		}
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !strings.HasPrefix(string(text), header) {
			continue // not ours
		}
		if err == nil {
			err = os.Remove(file)
		}
		if err != nil {
			return err
		}
		_ = os.Remove(filepath.Dir(file)) // if it is empty
	}
	return nil
}

// hostsFolder is the name of a registry's folder, as containerd reads it (hostDirectory in core/remotes/docker/config).
func hostsFolder(registry string) string {
	if at := strings.LastIndex(registry, ":"); at > 0 {
		return registry[:at] + "_" + registry[at+1:] + "_"
	}
	return registry
}
