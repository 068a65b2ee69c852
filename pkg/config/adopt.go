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
		all = append(all, settings(s.flags.Lookup(name))...)
	}
	return all
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
		have, want := settings(flag), settings(flag)
		if values, ok := values[name]; ok && !(replace && flag.Changed) {
			if err := set(flag, values); err != nil {
				return nil, fmt.Errorf("the cluster's setting %s: %w", name, plain(err))
			}
			want = settings(flag)
		}
		if flag.Changed && !slices.Equal(slices.Sorted(slices.Values(have)), slices.Sorted(slices.Values(want))) {
			differ = append(differ, fmt.Sprintf("here --%s, in the cluster --%s", strings.Join(have, " --"), strings.Join(want, " --")))
		}
	}
	if len(differ) > 0 {
		return nil, fmt.Errorf("the settings of this server differ from the cluster's, which all servers share: %s. Remove them here: a server that joins takes them from the cluster", strings.Join(differ, "; "))
	}
	adopted, err := s.flags.raw.checkServer()
	if err != nil {
		return nil, fmt.Errorf("the cluster's settings do not fit this server: %w", err)
	}
	adopted.ClusterFlags, adopted.flags, adopted.Notes = s.flags.given(clusterFlags()), s.flags, s.Notes
	return adopted, nil
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
