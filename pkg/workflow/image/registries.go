package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/BurntSushi/toml"
)

// registriesVar names the file with the settings of registries for buildah and podman (containers-registries.conf(5)). The
// drop-in folders next to the usual files are still read.
const registriesVar = "CONTAINERS_REGISTRIES_CONF"

// shortNames makes a name without a registry refer to docker.io, as in Docker and containerd: Debian's buildah and podman have no
// registry for such names and reject them. It returns the content for the file of registriesVar: the settings of this user, with
// that line. It returns "" if a file already defines registries for such names, even an empty list.
func shortNames(home, etc string) (string, error) {
	main := os.Getenv(registriesVar)
	if main == "" {
		main = filepath.Join(home, ".config", "containers", "registries.conf")
		if _, err := os.Stat(main); err != nil {
			main = filepath.Join(etc, "registries.conf")
		}
	}
	dropIns, err := filepath.Glob(filepath.Join(etc, "registries.conf.d", "*.conf"))
	if err != nil {
		return "", err
	}
	own, err := filepath.Glob(filepath.Join(home, ".config", "containers", "registries.conf.d", "*.conf"))
	if err != nil {
		return "", err
	}
	var text string
	for _, file := range slices.Concat([]string{main}, dropIns, own) {
		content, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		var settings map[string]any
		if err := toml.Unmarshal(content, &settings); err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		_, set := settings["unqualified-search-registries"]
		_, old := settings["registries"] // the first version of the format, which cannot be mixed with the second
		if set || old {
			return "", nil
		}
		if file == main {
			text = string(content)
		}
	}
	return "unqualified-search-registries = [\"docker.io\"]\n" + text, nil
}

// environ is the environment of the engine's programs. cleanup removes what was written for them.
func (e engine) environ() (env []string, cleanup func(), err error) {
	env, cleanup = os.Environ(), func() {}
	if e.program == "docker" {
		return env, cleanup, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, nil, err
	}
	text, err := shortNames(home, "/etc/containers")
	if err != nil || text == "" {
		return env, cleanup, err
	}
	file, err := os.CreateTemp("", "polymesh-registries-*.conf")
	if err != nil {
		return nil, nil, err
	}
	cleanup = func() { os.Remove(file.Name()) }
	_, err = file.WriteString(text)
	if err := errors.Join(err, file.Close()); err != nil {
		cleanup()
		return nil, nil, err
	}
	return append(env, registriesVar+"="+file.Name()), cleanup, nil
}
