package image

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// client is a package manager with settings on this machine.
type client struct {
	name  string
	files []settingsFile
	// What the environment sets, as a file that the client reads too.
	prefix, there, head, form string
}

type settingsFile struct{ here, there string }

// clients returns the package managers whose settings a build can get. They may contain passwords.
func clients(home string) []client {
	return []client{
		{name: "cargo", files: []settingsFile{{filepath.Join(home, ".cargo", "config.toml"), "/usr/local/cargo/config.toml"}}}, // CARGO_HOME of the rust images
		{name: "go", files: []settingsFile{{filepath.Join(home, ".config", "go", "env"), "/root/.config/go/env"}}},
		{name: "maven", files: []settingsFile{{filepath.Join(home, ".m2", "settings.xml"), "/root/.m2/settings.xml"}}},
		{name: "npm", files: []settingsFile{{filepath.Join(home, ".npmrc"), "/root/.npmrc"}},
			prefix: "NPM_CONFIG_", there: "/usr/local/etc/npmrc", form: "%s=%s\n"},
		{name: "pip", files: []settingsFile{{"/etc/pip.conf", "/etc/pip.conf"}},
			prefix: "PIP_", there: "/root/.config/pip/pip.conf", head: "[global]\n", form: "%s = %s\n"},
	}
}

// Clients returns the values of Source.Settings.
func Clients() []string {
	var names []string
	for _, c := range clients("") {
		names = append(names, c.name)
	}
	return names
}

// authorities returns mounts of the CAs that this machine trusts: they are not secret, and a build needs them to reach a registry
// behind a proxy or mirror with a private CA.
func authorities() []string {
	const there = "/etc/ssl/certs/ca-certificates.crt"
	for _, here := range []string{there /* Debian, Alpine */, "/etc/pki/tls/certs/ca-bundle.crt" /* Red Hat */} {
		if info, err := os.Stat(here); err == nil && info.Mode().IsRegular() {
			return []string{here + ":" + there}
		}
	}
	return nil
}

// settings returns mounts with the settings of this machine's package managers: their mirrors and logins. They exist only during the
// build, so nothing of them stays in an image. cleanup removes the files that were written for them.
func settings(wanted []string) (mounts []string, cleanup func(), err error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range wanted {
		if !slices.Contains(Clients(), name) {
			return nil, nil, fmt.Errorf("settings %q is not one of %s", name, strings.Join(Clients(), ", "))
		}
	}
	dir, err := os.MkdirTemp("", "polymesh-settings-") // 0700
	if err != nil {
		return nil, nil, err
	}
	cleanup = func() { os.RemoveAll(dir) }
	for _, c := range clients(home) {
		if !slices.Contains(wanted, c.name) {
			continue
		}
		for _, file := range c.files {
			if info, err := os.Stat(file.here); err == nil && info.Mode().IsRegular() {
				mounts = append(mounts, file.here+":"+file.there)
			}
		}
		text := c.environment()
		if text == "" {
			continue
		}
		file := filepath.Join(dir, c.name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			cleanup()
			return nil, nil, err
		}
		mounts = append(mounts, file+":"+c.there)
	}
	return mounts, cleanup, nil
}

// environment returns a settings file with what this machine's environment sets for a client; empty if it sets nothing.
func (c client) environment() string {
	var text strings.Builder
	for _, variable := range os.Environ() {
		key, value, _ := strings.Cut(variable, "=")
		name, ours := strings.CutPrefix(strings.ToUpper(key), c.prefix)
		if c.prefix == "" || !ours || value == "" || !slices.Contains([]string{"INDEX_URL", "EXTRA_INDEX_URL", "TRUSTED_HOST", "DEFAULT_TIMEOUT", "REGISTRY"}, name) {
			continue
		}
		key = strings.ToLower(name)
		if c.name == "pip" {
			key = strings.ReplaceAll(key, "_", "-")
		}
		fmt.Fprintf(&text, c.form, key, value)
	}
	if text.Len() == 0 {
		return ""
	}
	return c.head + text.String()
}

// unused returns the clients with settings on this machine that a build did not get.
func unused(given []string) []string {
	home, err := os.UserHomeDir()
	if err != nil {
		return nil
	}
	var names []string
	for _, c := range clients(home) {
		there := c.environment() != ""
		for _, file := range c.files {
			info, err := os.Stat(file.here)
			there = there || err == nil && info.Mode().IsRegular()
		}
		if there && !slices.Contains(given, c.name) {
			names = append(names, c.name)
		}
	}
	return names
}
