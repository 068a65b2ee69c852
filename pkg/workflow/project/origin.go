package project

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Origin says where a project is deployed from. Its name alone does not: two folders, on one machine or on two, may have the
// same. pkg/workflow/deploy records the origin in the cluster and compares it.
type Origin struct {
	// ID is what polymesh.yaml says, if it says one.
	ID string `json:"id,omitempty"`
	// Repository is that of the git remote "origin", as host/path, without scheme, login and ".git"; empty without one.
	Repository string `json:"repository,omitempty"`
	// Path is the project's folder in the repository; "." at its top.
	Path string `json:"path,omitempty"`
	// Host, Machine and Dir are the machine's name, a hash of its id, and the folder on it.
	Host    string `json:"host,omitempty"`
	Machine string `json:"machine,omitempty"`
	Dir     string `json:"dir,omitempty"`
}

// Same reports whether two origins are of one project: by their ids if both have one, or else by their repositories, so that
// checkouts and worktrees on any machine are the same project, or else by machine and folder. What is not known to be the
// same is not.
func (o Origin) Same(other Origin) bool {
	switch {
	case o.ID != "" && other.ID != "":
		return o.ID == other.ID
	case o.Repository != "" && other.Repository != "":
		return o.Repository == other.Repository && o.Path == other.Path
	}
	return o.Dir != "" && o.Dir == other.Dir && o.Host == other.Host && o.Machine == other.Machine
}

// String describes the origin for a person.
func (o Origin) String() string {
	var parts []string
	if o.ID != "" {
		parts = append(parts, "id "+o.ID)
	}
	if o.Repository != "" {
		parts = append(parts, "repository "+o.Repository+", folder "+o.Path)
	}
	if o.Dir != "" {
		parts = append(parts, o.Dir+" on "+o.Host)
	}
	if len(parts) == 0 {
		return "an unknown place"
	}
	return strings.Join(parts, "; ")
}

// machineID identifies the machine's installation (machine-id(5)).
const machineID = "/etc/machine-id"

// Origin is the project's own.
func (p *Project) Origin(ctx context.Context) (Origin, error) {
	dir, err := filepath.EvalSymlinks(p.Dir)
	if err != nil {
		return Origin{}, fmt.Errorf("find out where the project is: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return Origin{}, fmt.Errorf("find out where the project is: %w", err)
	}
	o := Origin{ID: p.ID, Host: host, Dir: dir}
	// The id itself is not to be published (machine-id(5)). A machine without one has its name.
	if id, err := os.ReadFile(machineID); err == nil {
		sum := sha256.Sum256(append([]byte("polymesh project origin\n"), id...))
		o.Machine = hex.EncodeToString(sum[:16])
	}
	// A folder that is in no repository, or a machine without git, has machine and folder.
	if remote, err := git(ctx, dir, "config", "--get", "remote.origin.url"); err == nil {
		if o.Repository = repository(remote); o.Repository != "" {
			prefix, err := git(ctx, dir, "rev-parse", "--show-prefix")
			if err != nil {
				return Origin{}, fmt.Errorf("find out where %s is in its git repository: %w", dir, err)
			}
			o.Path = path.Clean(prefix)
		}
	}
	return o, nil
}

// gitWait is how long git may take to read its configuration.
const gitWait = 10 * time.Second

// git asks git about the repository that dir is in. Nothing of it is run: whoever owns the folder, as root deploys a user's.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, gitWait)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-C", dir}, args...)...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "GIT_") { // a hook's variables say another repository
			cmd.Env = append(cmd.Env, v)
		}
	}
	out, err := cmd.Output()
	return strings.TrimSuffix(string(out), "\n"), err
}

// repository is a remote's address in the form in which all who clone it have it: host/path. A local one is nothing that
// another machine has, so it does not count.
func repository(remote string) string {
	var host, at string
	if scheme, _, ok := strings.Cut(remote, "://"); ok {
		u, err := url.Parse(remote)
		if err != nil || scheme == "file" {
			return ""
		}
		host, at = u.Host, u.Path
	} else {
		// [user@]host:path, as scp has it. A colon behind a slash is part of a local path.
		name, rest, ok := strings.Cut(remote, ":")
		if !ok || strings.Contains(name, "/") {
			return ""
		}
		host, at = name[strings.LastIndexByte(name, '@')+1:], rest
	}
	at = strings.TrimSuffix(strings.Trim(path.Clean("/"+at), "/"), ".git")
	if host == "" || at == "" {
		return ""
	}
	return strings.ToLower(host) + "/" + at
}
