// The launcher is what a user runs as `polymesh`: a small static program in front of the payload. It rejects a bad command
// line or an unsuitable machine before anything is changed, unpacks what the command needs, and executes the program.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
)

// agentGOGC makes an agent 8 MB smaller than Go's default does: what packages create before main lives on, and is spread over as much
// heap as the collector allows then.
const agentGOGC = "10"

func main() {
	if err := run(os.Args, os.Environ()); err != nil {
		fmt.Fprintln(os.Stderr, "polymesh:", err)
		os.Exit(1)
	}
}

func run(args, environ []string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program's own file: %w", err)
	}
	p, err := payload.Open(self)
	if err != nil {
		return err
	}
	defer p.Close()

	var dir payload.Dir
	agent := false
	// Called through a link named kubectl or istioctl, `server` is an argument for that program.
	if tool := filepath.Base(args[0]); len(args) > 1 && (args[1] == "server" || args[1] == "agent") && tool != "kubectl" && tool != "istioctl" {
		agent = args[1] == "agent"
		dir, err = forNode(p, args[1], args[2:], environ)
	}
	if dir == "" && err == nil {
		dir, err = forCommand(p)
	}
	if err != nil {
		return err
	}
	set := map[string]string{payload.EnvDir: string(dir), payload.EnvFile: self}
	if agent && os.Getenv("GOGC") == "" {
		set["GOGC"], set[payload.EnvGOGC] = agentGOGC, agentGOGC
	}
	// If a variable is set twice, Go programs use the first, and a process started by a Polymesh has it already.
	env := slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		_, ours := set[name]
		return ours || name == payload.EnvGOGC
	})
	for name, value := range set {
		env = append(env, name+"="+value)
	}
	// The program detects by argv[0] whether it was called as kubectl or istioctl.
	if err := unix.Exec(dir.Path(payload.Program), args, env); err != nil {
		return fmt.Errorf("run %s: %w", dir.Path(payload.Program), err)
	}
	return nil
}

// forNode checks everything that `polymesh server` or `polymesh agent` needs and unpacks the whole payload to the data dir. The
// result is empty if the user only requested help.
func forNode(p *payload.Payload, role string, args, environ []string) (payload.Dir, error) {
	var node *config.Node
	var check func(need uint64) []preflight.Result
	var err error
	if role == "agent" {
		var cfg *config.Agent
		if cfg, err = config.ParseAgent(args, environ); err == nil {
			node, check = &cfg.Node, func(need uint64) []preflight.Result { return preflight.Agent(cfg, need) }
		}
	} else {
		var cfg *config.Server
		if cfg, err = config.Parse(args, environ); err == nil {
			node, check = &cfg.Node, func(need uint64) []preflight.Result { return preflight.Server(cfg, need) }
		}
	}
	if errors.Is(err, pflag.ErrHelp) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	dir := payload.In(string(node.DataDir), p.ID)
	names, size := p.Missing(dir, false)
	// containerd unpacks the images again, and the datastore needs space to start.
	const spare = 64 << 20
	if err := preflight.Failed(check(2*size + spare)); err != nil {
		return "", err
	}
	unix.Umask(layout.Umask)
	// Before anything else is written, so that files of an interrupted start are recognized as ours.
	if _, err := datadir.Claim(node.DataDir); err != nil {
		return "", err
	}
	return dir, p.Unpack(dir, names)
}

// forCommand finds the program for every other command. A data dir that already contains it is used; otherwise it goes to
// the user's cache, so that using a cluster needs neither root nor a server on this machine. Wherever it is, no other
// user may be able to change it: it runs with this user's permissions, and with `sudo -E` the environment is another user's.
func forCommand(p *payload.Payload) (payload.Dir, error) {
	uid := os.Geteuid()
	dataDirs := []string{string(layout.DefaultDataDir)}
	if d := os.Getenv("POLYMESH_DATA_DIR"); d != "" {
		dataDirs = append([]string{d}, dataDirs...)
	}
	for _, d := range dataDirs {
		dir := payload.In(d, p.ID)
		if missing, _ := p.Missing(dir, true); len(missing) > 0 {
			continue
		}
		if real, err := private(string(dir), uid); err == nil && ownProgram(payload.Dir(real), uid) {
			return payload.Dir(real), nil
		}
	}
	cache, err := cacheDir(uid)
	if err != nil {
		return "", err
	}
	dir := payload.In(cache, p.ID)
	if _, err := os.Lstat(dir.Path(payload.Program)); err == nil && !ownProgram(dir, uid) {
		if err := os.Remove(dir.Path(payload.Program)); err != nil {
			return "", fmt.Errorf("remove a program that another user can change: %w", err)
		}
	}
	names, size := p.Missing(dir, true)
	if len(names) == 0 {
		return dir, nil
	}
	if err := preflight.Writable(string(dir), size); err != nil {
		return "", err
	}
	if noexec, err := preflight.NoExec(string(dir)); err != nil {
		return "", err
	} else if noexec {
		return "", fmt.Errorf("the file system of %s is mounted with noexec, so the program that is unpacked there cannot be run: set XDG_CACHE_HOME to a folder on another file system", cache)
	}
	if err := p.Unpack(dir, names); err != nil {
		return "", err
	}
	// It only takes up space: the command runs without it.
	_ = payload.RemoveOld(cache, p.ID)
	return dir, nil
}

func ownProgram(dir payload.Dir, uid int) bool {
	program := dir.Path(payload.Program)
	real, err := private(program, uid)
	return err == nil && real == program
}

// cacheDir returns a folder for programs that only this user, or root, can write.
func cacheDir(uid int) (string, error) {
	if cache, err := os.UserCacheDir(); err == nil {
		if dir, err := private(filepath.Join(cache, "polymesh"), uid); err == nil {
			return dir, nil
		}
	}
	// No home, as in a service, or another user's.
	temp, err := privateTemp(os.TempDir(), uid)
	if err != nil {
		return "", err
	}
	return private(temp, uid)
}

// private returns a path without links, if only this user and root can change what it points to. If it does not exist
// yet, the folder in which it will be created is checked. The rules are those of OpenSSH for authorized_keys (misc.c,
// safe_path), with two exceptions: in a folder like /tmp users cannot replace files of others, and a group with the
// user's own id has no other member.
func private(path string, uid int) (string, error) {
	existing, rest := path, ""
	for {
		if _, err := os.Lstat(existing); err == nil {
			break
		} else if !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		existing, rest = filepath.Dir(existing), filepath.Join(filepath.Base(existing), rest)
	}
	real, err := filepath.EvalSymlinks(existing)
	if err != nil {
		return "", err
	}
	last := true
	for part := real; ; part = filepath.Dir(part) {
		info, err := os.Lstat(part)
		if err != nil {
			return "", err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		// In a sandbox the root folder's owner may be a user without an id in it.
		if !ok || st.Uid != 0 && int(st.Uid) != uid && part != "/" {
			return "", fmt.Errorf("%s belongs to another user", part)
		}
		others := info.Mode().Perm() & 0o022
		if int(st.Gid) == uid {
			others &= 0o002
		}
		if others != 0 && (last || info.Mode()&os.ModeSticky == 0) {
			return "", fmt.Errorf("%s is writable by other users", part)
		}
		if part == filepath.Dir(part) {
			return filepath.Join(real, rest), nil
		}
		last = false
	}
}

// privateTemp returns a folder in the temporary folder that only this user can write: a program in another user's would
// be run as this user.
func privateTemp(temp string, uid int) (string, error) {
	dir := filepath.Join(temp, fmt.Sprintf("polymesh-%d", uid))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("create a folder for the program: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("create a folder for the program: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(st.Uid) != uid || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%s is not this user's own folder: remove it, or set HOME or XDG_CACHE_HOME", dir)
	}
	return dir, nil
}
