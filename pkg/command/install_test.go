package command

import (
	"slices"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/service"
)

// What is installed is a server, unless a setting makes the machine join another; secrets are never arguments.
func TestServiceSettings(t *testing.T) {
	secret := "K10" + strings.Repeat("0a", 32) + "::abcdef.0123456789abcdef"
	for what, c := range map[string]struct {
		args, flags []string
		env         map[string]string
		role        service.Role
		arguments   []string
		environment []string
		want        string // of the error
	}{
		"a server":            {flags: []string{"--mesh-profile=demo"}, role: service.Server, arguments: []string{"--mesh-profile=demo"}},
		"an agent, by a flag": {flags: []string{"--server=https://a:6443"}, role: service.Agent, arguments: []string{"--server=https://a:6443"}},
		"an agent, as K3s": {
			env: map[string]string{"POLYMESH_URL": "https://a:6443", "POLYMESH_TOKEN": secret}, role: service.Agent,
			environment: []string{"POLYMESH_TOKEN=" + secret, "POLYMESH_URL=https://a:6443"},
		},
		"an agent, by name": {args: []string{"agent"}, flags: []string{"--node-name=n"}, role: service.Agent, arguments: []string{"--node-name=n"}},
		"a token as a flag": {
			flags: []string{"--server=https://a:6443", "--token=" + secret}, role: service.Agent,
			arguments: []string{"--server=https://a:6443"}, environment: []string{"POLYMESH_TOKEN=" + secret},
		},
		"a server's flag": {flags: []string{"--server=https://a:6443", "--mesh-profile=demo"}, want: "--mesh-profile is a flag of `polymesh server`, and this installs `polymesh agent`: for a server that joins others, name the role: `polymesh install server`"},
		"a further server": {
			args: []string{"server"}, flags: []string{"--server=https://a:6443", "--token-file=/t"}, role: service.Server,
			arguments: []string{"--server=https://a:6443", "--token-file=/t"},
		},
		"a token only":     {env: map[string]string{"POLYMESH_TOKEN": secret}, want: "POLYMESH_TOKEN is set, but no server of the cluster: set POLYMESH_URL too"},
		"nothing was said": {},
	} {
		t.Run(what, func(t *testing.T) {
			for name, value := range c.env {
				t.Setenv(name, value)
			}
			cmd := newInstall()
			server, agent := config.RoleFlags()
			cmd.ResetFlags()
			serverFlags(cmd, server)
			cmd.Flags().AddFlagSet(agent.FlagSet)
			if err := cmd.ParseFlags(c.flags); err != nil {
				t.Fatal(err)
			}
			got, err := serviceSettings(c.args, server, agent)
			switch {
			case c.want != "":
				if err == nil || err.Error() != c.want {
					t.Errorf("error is %v, want %s", err, c.want)
				}
			case err != nil:
				t.Error(err)
			case c.role == "":
				if got != nil {
					t.Errorf("the settings are %+v, want those of before", got)
				}
			case got.Role != c.role || !slices.Equal(got.Args, c.arguments) || !slices.Equal(got.Environment, c.environment):
				t.Errorf("got %+v", got)
			}
		})
	}
}
