// Package service installs Polymesh on a machine as a service of systemd, and removes it again.
//
// It owns the file in /usr/local/bin, the links kubectl and istioctl next to it, the systemd unit with its environment file,
// and a record of what it has written there. What is not in the record, or has been changed since, is someone else's and
// stays as it is. A server's data is not its business: pkg/reset removes that. Plan shows what an install would do, Install
// does it; PlanRemoval, Stop and Remove do the same for an uninstall, with whatever is to happen to the data in between.
// `polymesh install` and `polymesh uninstall` call them.
package service

import (
	"errors"
	"os"
	"path/filepath"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Where things are installed. The unit and its environment file lie where K3s's install.sh has them.
const (
	Program         = "/usr/local/bin/polymesh"
	Unit            = "/etc/systemd/system/" + layout.Unit
	EnvironmentFile = Unit + ".env"

	recordDir  = "/usr/local/lib/polymesh"
	recordFile = recordDir + "/installed.json"
	// dropIns is where users change a unit without editing it.
	dropIns = Unit + ".d"
)

// links are the names under which the file is another program.
var links = []string{"/usr/local/bin/kubectl", "/usr/local/bin/istioctl"}

// ErrNoSystemd is returned where a service is requested and systemd does not run.
var ErrNoSystemd = errors.New("systemd does not run on this machine, so there is no service to install: `polymesh install --no-service` installs the file alone, and the machine's own service manager can run `polymesh server` or `polymesh agent`")

// Role is what the service runs: `polymesh server` or `polymesh agent`.
type Role string

const (
	Server Role = "server"
	Agent  Role = "agent"
)

// Settings are what the service runs with.
type Settings struct {
	Role Role
	// Args follow `polymesh server`, or `polymesh agent`. They can be read by every user of the machine.
	Args []string
	// Environment are variables, NAME=value. They lie in a file that only root can read.
	Environment []string
}

// Node is what the service's settings say of its node.
type Node struct {
	*config.Node
	// Kubeconfig is where a server writes the administrator's; empty for an agent.
	Kubeconfig string
}

// check refuses what `polymesh server`, or agent, would refuse.
func (s *Settings) check() (*Node, error) {
	if s.Role == Agent {
		cfg, err := config.ParseAgent(s.Args, s.Environment)
		if err != nil {
			return nil, err
		}
		if err := preflight.Token(cfg); err != nil {
			return nil, err
		}
		return &Node{&cfg.Node, ""}, nil
	}
	cfg, err := config.Parse(s.Args, s.Environment)
	if err != nil {
		return nil, err
	}
	if err := preflight.ServerToken(cfg); err != nil {
		return nil, err
	}
	return &Node{&cfg.Node, cfg.Kubeconfig}, nil
}

// Machine is where Polymesh is, or will be, installed. The zero value is this machine.
type Machine struct {
	// Root stands in front of every path that is read or written; empty: /. For tests.
	Root string
	// Systemctl is how systemctl is run; empty: "systemctl".
	Systemctl []string
	// Path is where the machine's programs are searched, as in $PATH.
	Path string
}

func (m *Machine) path(name string) string {
	if m.Root == "" {
		return name
	}
	return filepath.Join(m.Root, name)
}

// HasSystemd reports whether systemd runs the machine's services (sd_booted(3)).
func (m *Machine) HasSystemd() bool {
	_, err := os.Stat(m.path("/run/systemd/system"))
	return err == nil
}

// Installed returns what the service runs with, and false where no service was installed.
func (m *Machine) Installed() (*Node, bool, error) {
	r, err := m.readRecord()
	if err != nil || !r.owns(Unit) {
		return nil, false, err
	}
	settings, err := m.settings(r)
	if err != nil {
		return nil, false, err
	}
	cfg, err := settings.check()
	return cfg, err == nil, err
}

// Role returns what the installed service runs; empty where no service was installed.
func (m *Machine) Role() (Role, error) {
	r, err := m.readRecord()
	if err != nil || !r.owns(Unit) {
		return "", err
	}
	settings, err := m.settings(r)
	if err != nil {
		return "", err
	}
	return settings.Role, nil
}

// settings are those of the last install.
func (m *Machine) settings(r *record) (*Settings, error) {
	environment, err := readEnvironment(m.path(EnvironmentFile))
	if err != nil {
		return nil, err
	}
	role := r.Role
	if role == "" {
		role = Server // of a version that had no agents
	}
	return &Settings{Role: role, Args: r.Args, Environment: environment}, nil
}

// Action is what happens to one thing.
type Action string

const (
	Create    Action = "create"
	Replace   Action = "replace"
	Unchanged Action = "unchanged"
	Leave     Action = "leave" // it is there, and not ours to change
	Delete    Action = "delete"
	Enable    Action = "enable"
	Start     Action = "start"
	Restart   Action = "restart"
	Stop      Action = "stop"
)

// Change is one line of a plan.
type Change struct {
	// Target is a path, or the name of the unit.
	Target string `json:"target"`
	Action Action `json:"action"`
	// Reason explains why, if that is not obvious.
	Reason string `json:"reason,omitempty"`
}

// done words an action that has been done.
func (a Action) done() string {
	switch a {
	case Create:
		return "installed"
	case Replace:
		return "replaced"
	case Delete:
		return "removed"
	case Enable:
		return "enabled"
	case Start:
		return "started"
	case Restart:
		return "restarted"
	case Stop:
		return "stopped"
	}
	return string(a)
}
