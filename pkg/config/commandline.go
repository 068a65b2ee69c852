package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// files are the settings that name files or folders. A relative name in them is meant from the folder in which the user is.
var files = []string{"config", "data-dir", "token-file", "write-kubeconfig", "resolv-conf", "audit-policy-file", "image-policy-key",
	"private-registry", "snapshot-dir", "snapshot-passphrase-file", "s3-endpoint-ca", "s3-access-key-file", "s3-secret-key-file",
	"datastore-endpoint-file", "datastore-cafile", "datastore-certfile", "datastore-keyfile"}

// secretFlags are settings that other users must not read, or that may contain a password: an environment can be private, a command line cannot.
var secretFlags = []string{"token", "s3-access-key", "s3-secret-key", "datastore-endpoint"}

// CommandLine returns the flags that were given, except secrets, in a form that means the same from every folder: one word for each value,
// and absolute file names. It has to be called before Server, which also fills in what was not given as a flag.
func (f *Flags) CommandLine() ([]string, error) {
	var args []string
	var failure error
	f.VisitAll(func(flag *pflag.Flag) {
		if !flag.Changed || failure != nil || slices.Contains(secretFlags, flag.Name) {
			return
		}
		values := []string{flag.Value.String()}
		slice, list := flag.Value.(pflag.SliceValue)
		if list {
			values = slice.GetSlice()
		}
		for _, value := range values {
			value, err := absolute(flag.Name, value)
			if err != nil {
				failure = err
				return
			}
			// pflag reads such a list as a line of CSV.
			if list && flag.Value.Type() == "stringSlice" && strings.ContainsAny(value, `,"`) {
				value = `"` + strings.ReplaceAll(value, `"`, `""`) + `"`
			}
			args = append(args, "--"+flag.Name+"="+value)
		}
	})
	return args, failure
}

// Environment returns those of the variables (NAME=value) that are settings of a server, with absolute file names. One that
// a flag overrides is left out, and secrets given by flags are added. Like CommandLine it has to be called before Server.
func (f *Flags) Environment(environ []string) ([]string, error) {
	var variables []string
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		if key == passphraseVariable && value != "" {
			variables = append(variables, kv)
			continue
		}
		flag := f.variable(key)
		if flag == nil || flag.Changed || value == "" {
			continue
		}
		values := []string{value}
		if flag.Value.Type() == "stringSlice" {
			values = strings.Split(value, ",")
		}
		for i := range values {
			var err error
			if values[i], err = absolute(flag.Name, values[i]); err != nil {
				return nil, err
			}
		}
		variables = append(variables, key+"="+strings.Join(values, ","))
	}
	for _, name := range secretFlags {
		if flag := f.Lookup(name); flag != nil && flag.Changed {
			variables = append(variables, envPrefix+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+flag.Value.String())
		}
	}
	slices.Sort(variables)
	return variables, nil
}

// variable is the flag that an environment variable sets; nil where it is none of ours.
func (f *Flags) variable(key string) *pflag.Flag {
	name, ours := strings.CutPrefix(key, envPrefix)
	if !ours || name != strings.ToUpper(name) {
		return nil
	}
	// K3s's name for --server is K3S_URL.
	if name == "URL" {
		name = "server"
	}
	return f.Lookup(strings.ReplaceAll(strings.ToLower(name), "_", "-"))
}

func absolute(name, value string) (string, error) {
	if value == "" || !slices.Contains(files, name) || name == imagePolicyKey && strings.HasPrefix(value, inlineKey) {
		return value, nil
	}
	path, err := filepath.Abs(value)
	if err != nil {
		return "", fmt.Errorf("--%s %q: %w", name, value, err)
	}
	return path, nil
}
