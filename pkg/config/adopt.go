package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// Settings returns all cluster-wide settings, as name=value, for a server that joins.
func (s *Server) Settings() []string {
	var all []string
	for _, name := range clusterFlags() {
		all = append(all, s.settings(s.flags.Lookup(name))...)
	}
	return all
}

// settings are the values of a flag as they mean the same on every server.
func (s *Server) settings(flag *pflag.Flag) []string {
	if flag.Name != imagePolicyKey || len(s.ImagePolicyKeys) == 0 {
		return settings(flag)
	}
	var all []string
	for _, key := range s.ImagePolicyKeys {
		all = append(all, flag.Name+"="+inline(key))
	}
	return all
}

// given returns the cluster-wide settings that have another value than the default.
func (s *Server) given() (given []string) {
	for _, name := range clusterFlags() {
		if flag := s.flags.Lookup(name); flag.Value.String() != flag.DefValue {
			given = append(given, s.settings(flag)...)
		}
	}
	return given
}

// Adopt returns the configuration with the cluster's settings, which another server's Settings returned. It is an error if a setting was
// given here with another value.
func (s *Server) Adopt(cluster []string) (*Server, error) { return s.adopt(cluster, false) }

// Replace is Adopt for the server whose settings are to be the cluster's: those that were given here win.
func (s *Server) Replace(cluster []string) (*Server, error) { return s.adopt(cluster, true) }

func (s *Server) adopt(cluster []string, replace bool) (*Server, error) {
	values := map[string][]string{}
	for _, setting := range cluster {
		name, value, _ := strings.Cut(setting, "=")
		if !slices.Contains(clusterFlags(), name) {
			return nil, fmt.Errorf("the cluster has the setting %.60q, which this version does not know: use the servers' version here", name)
		}
		values[name] = append(values[name], value)
	}
	var differ []string
	for _, name := range clusterFlags() {
		flag := s.flags.Lookup(name)
		have, want, shown := s.settings(flag), s.settings(flag), settings(flag)
		if values, ok := values[name]; ok && !(replace && flag.Changed) {
			if name == imagePolicyKey {
				if values, ok = sharedKeys(values); !ok && flag.Changed {
					continue // the version before shared the names of files, which this machine does not have: the keys are those given here
				}
			}
			if err := set(flag, values); err != nil {
				return nil, fmt.Errorf("the cluster's setting %s: %w", name, plain(err))
			}
			want = settings(flag)
		}
		if flag.Changed && !slices.Equal(slices.Sorted(slices.Values(have)), slices.Sorted(slices.Values(want))) {
			differ = append(differ, fmt.Sprintf("here %s, in the cluster %s", list(shown), list(want)))
		}
	}
	if len(differ) > 0 {
		return nil, fmt.Errorf("the settings of this server differ from the cluster's, which all servers share: %s. Remove them here: a server that joins takes them from the cluster", strings.Join(differ, "; "))
	}
	adopted, err := s.flags.raw.checkServer()
	if err != nil {
		return nil, fmt.Errorf("the cluster's settings do not fit this server: %w", err)
	}
	adopted.flags, adopted.Notes = s.flags, s.Notes
	adopted.ClusterFlags = adopted.given()
	return adopted, nil
}

// sharedKeys returns the cluster's keys in the form that means the same on every machine. The version before shared the names of files; it
// returns false if one of them is not here.
func sharedKeys(values []string) (keys []string, ok bool) {
	for _, value := range values {
		if value != "" {
			der, err := publicKey(value)
			if err != nil {
				return values, strings.HasPrefix(value, inlineKey)
			}
			value = inline(der)
		}
		keys = append(keys, value)
	}
	return keys, true
}

// list is settings as flags, for a user.
func list(settings []string) string {
	var flags []string
	for _, setting := range settings {
		flags = append(flags, "--"+described(setting))
	}
	return strings.Join(flags, " ")
}

// set replaces a flag's value. It stays as if it had not been given, where it was not.
func set(flag *pflag.Flag, values []string) error {
	if list, ok := flag.Value.(pflag.SliceValue); ok {
		if len(values) == 1 && values[0] == "" {
			values = nil
		}
		return list.Replace(values)
	}
	return flag.Value.Set(values[0])
}

// settings returns a flag's values, as name=value. An empty list is one empty value.
func settings(flag *pflag.Flag) (settings []string) {
	values := []string{flag.Value.String()}
	if list, ok := flag.Value.(pflag.SliceValue); ok {
		values = list.GetSlice()
		if len(values) == 0 {
			values = []string{""}
		}
	}
	for _, value := range values {
		settings = append(settings, flag.Name+"="+value)
	}
	return settings
}
