package image

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// clientSettings are mounts that show a build how this machine reaches package registries: whom it trusts, and which
// mirrors its clients ask. They exist for the time of the build only, so nothing of them, such as a password of a mirror,
// stays in an image. cleanup removes what had to be written for them.
func clientSettings() (mounts []string, cleanup func(), err error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, nil, err
	}
	for _, file := range []struct{ here, there string }{
		{"/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/ca-certificates.crt"}, // Debian, Alpine
		{"/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/certs/ca-certificates.crt"},   // Red Hat
		{"/etc/pip.conf", "/etc/pip.conf"},
		{filepath.Join(home, ".npmrc"), "/root/.npmrc"},
		{filepath.Join(home, ".m2", "settings.xml"), "/root/.m2/settings.xml"},
		{filepath.Join(home, ".config", "go", "env"), "/root/.config/go/env"},
		{filepath.Join(home, ".cargo", "config.toml"), "/usr/local/cargo/config.toml"}, // CARGO_HOME of the rust images
	} {
		taken := slices.ContainsFunc(mounts, func(m string) bool { return strings.HasSuffix(m, ":"+file.there) })
		if info, err := os.Stat(file.here); err == nil && info.Mode().IsRegular() && !taken {
			mounts = append(mounts, file.here+":"+file.there)
		}
	}
	dir, err := os.MkdirTemp("", "polymesh-build-") // 0700
	if err != nil {
		return nil, nil, err
	}
	cleanup = func() { os.RemoveAll(dir) }
	// What stands in this machine's environment, for clients that read a file too.
	for _, client := range []struct{ prefix, there, head, form string }{
		{"PIP_", "/root/.config/pip/pip.conf", "[global]\n", "%s = %s\n"},
		{"NPM_CONFIG_", "/usr/local/etc/npmrc", "", "%s=%s\n"},
	} {
		var text strings.Builder
		for _, variable := range os.Environ() {
			key, value, _ := strings.Cut(variable, "=")
			name, ours := strings.CutPrefix(strings.ToUpper(key), client.prefix)
			if !ours || value == "" || !slices.Contains([]string{"INDEX_URL", "EXTRA_INDEX_URL", "TRUSTED_HOST", "DEFAULT_TIMEOUT", "REGISTRY"}, name) {
				continue
			}
			key = strings.ToLower(name)
			if client.prefix == "PIP_" {
				key = strings.ReplaceAll(key, "_", "-")
			}
			fmt.Fprintf(&text, client.form, key, value)
		}
		if text.Len() == 0 {
			continue
		}
		file := filepath.Join(dir, filepath.Base(client.there))
		if err := os.WriteFile(file, []byte(client.head+text.String()), 0o600); err != nil {
			cleanup()
			return nil, nil, err
		}
		mounts = append(mounts, file+":"+client.there)
	}
	return mounts, cleanup, nil
}
