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

// Origin identifies where a project is deployed from. Its name alone does not: two folders, on the same or different machines, may
// share it. pkg/workflow/deploy records the origin in the cluster and compares it.
type Origin struct {
	// ID is the id in polymesh.yaml, if any.
	ID string `json:"id,omitempty"`
	// Repository is the git remote "origin" as host/path, without scheme, login and ".git"; empty if there is none.
	Repository string `json:"repository,omitempty"`
	// Path is the project's folder in the repository; "." at its top.
	Path string `json:"path,omitempty"`
	// Host, Machine and Dir are the machine's name, a hash of its machine id, and the folder on it.
	Host    string `json:"host,omitempty"`
	Machine string `json:"machine,omitempty"`
	Dir     string `json:"dir,omitempty"`
}

// Same reports whether two origins are of the same project: by their ids if both have one, else by their repositories, so that
// checkouts and worktrees on any machine are the same project, else by machine and folder. If in doubt, it returns
// false.
func (o Origin) Same(other Origin) bool {
	switch {
	case o.ID != "" && other.ID != "":
		return o.ID == other.ID
	case o.Repository != "" && other.Repository != "":
		return o.Repository == other.Repository && o.Path == other.Path
	}
	return o.Dir != "" && o.Dir == other.Dir && o.Host == other.Host && o.Machine == other.Machine
}

// String describes the origin in messages.
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

// machineID is the file with the machine's id (machine-id(5)).
const machineID = "/etc/machine-id"

// Origin returns the project's origin.
func (p *Project) Origin(ctx context.Context) (Origin, error) {
	dir, err := filepath.EvalSymlinks(p.Dir)
	if err != nil {
		return Origin{}, fmt.Errorf("determine the project's origin: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return Origin{}, fmt.Errorf("determine the project's origin: %w", err)
	}
	o := Origin{ID: p.ID, Host: host, Dir: dir}
	// The id itself must not be published (machine-id(5)). A machine without an id is identified by its name.
	if id, err := os.ReadFile(machineID); err == nil {
		sum := sha256.Sum256(append([]byte("polymesh project origin\n"), id...))
		o.Machine = hex.EncodeToString(sum[:16])
	}
	// Without a repository or without git, only machine and folder are known.
	if remote, err := git(ctx, dir, "config", "--get", "remote.origin.url"); err == nil {
		if o.Repository = repository(remote); o.Repository != "" {
			prefix, err := git(ctx, dir, "rev-parse", "--show-prefix")
			if err != nil {
				return Origin{}, fmt.Errorf("determine the path of %s in its git repository: %w", dir, err)
			}
			o.Path = path.Clean(prefix)
		}
	}
	return o, nil
}

// gitWait is the timeout for git to read its configuration.
const gitWait = 10 * time.Second

// git queries the repository that contains dir. It runs nothing from the repository, whose owner may be another user.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, gitWait)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-C", dir}, args...)...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "GIT_") { // in a hook, these point to another repository
			cmd.Env = append(cmd.Env, v)
		}
	}
	out, err := cmd.Output()
	return strings.TrimSuffix(string(out), "\n"), err
}

// repository normalizes a remote's address to host/path, which is the same for all clones. Local addresses mean nothing on
// another machine and are ignored.
func repository(remote string) string {
	var host, at string
	if scheme, _, ok := strings.Cut(remote, "://"); ok {
		u, err := url.Parse(remote)
		if err != nil || scheme == "file" {
			return ""
		}
		host, at = u.Host, u.Path
	} else {
		// [user@]host:path, in scp's syntax. A colon after a slash is part of a local path.
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
