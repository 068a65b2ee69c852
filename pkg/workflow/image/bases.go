package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/distribution/reference"

	"polymesh.dev/polymesh/pkg/workflow/baseimage"
)

// stage is a part of a Dockerfile that begins with FROM.
type stage struct {
	name, from string
	uses       []string // of COPY --from and RUN --mount=from=
}

// Bases returns the images that a build starts from, as the Dockerfile names them: those of the stages that the target needs. It
// reads what a build reads before its first step: FROM, the ARGs before it, COPY --from and RUN --mount. A name that depends on
// more than that is omitted, and left to the builder.
func (s Source) Bases() ([]string, error) {
	text, err := os.ReadFile(filepath.Join(s.Context, s.Dockerfile))
	if err != nil {
		return nil, err
	}
	args := map[string]string{}
	var stages []stage
	for _, line := range instructions(string(text)) {
		word, rest, _ := strings.Cut(line, " ")
		fields := strings.Fields(rest)
		switch word = strings.ToUpper(word); {
		case word == "ARG" && len(stages) == 0:
			for _, field := range fields {
				key, value, _ := strings.Cut(field, "=")
				if given, ok := s.Args[key]; ok {
					value = given
				}
				args[key] = expand(strings.Trim(value, `"'`), args)
			}
		case word == "FROM":
			fields = slices.DeleteFunc(fields, func(f string) bool { return strings.HasPrefix(f, "--") })
			if len(fields) == 0 {
				continue
			}
			next := stage{from: expand(fields[0], args)}
			if len(fields) > 2 && strings.EqualFold(fields[1], "AS") {
				next.name = strings.ToLower(fields[2])
			}
			stages = append(stages, next)
		case len(stages) > 0 && slices.Contains([]string{"COPY", "ADD", "RUN"}, word):
			last := &stages[len(stages)-1]
			for _, field := range fields {
				if !strings.HasPrefix(field, "--") {
					break
				}
				if from, ok := strings.CutPrefix(field, "--from="); ok {
					last.uses = append(last.uses, from)
				}
				if mount, ok := strings.CutPrefix(field, "--mount="); ok {
					for option := range strings.SplitSeq(mount, ",") {
						if from, ok := strings.CutPrefix(option, "from="); ok {
							last.uses = append(last.uses, from)
						}
					}
				}
			}
		}
	}
	return bases(stages, s.Target), nil
}

// bases returns the images that a stage needs, in the order in which it names them.
func bases(stages []stage, target string) []string {
	find := func(name string, before int) int {
		if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < before {
			return n
		}
		for i := before - 1; i >= 0; i-- {
			if stages[i].name == strings.ToLower(name) && name != "" {
				return i
			}
		}
		return -1
	}
	at := len(stages) - 1
	if i := find(target, len(stages)); target != "" && i >= 0 {
		at = i
	}
	var found []string
	seen := map[int]bool{}
	var visit func(at int)
	visit = func(at int) {
		if at < 0 || seen[at] {
			return
		}
		seen[at] = true
		for _, name := range append([]string{stages[at].from}, stages[at].uses...) {
			if i := find(name, at); i >= 0 {
				visit(i)
			} else if name != "scratch" && name != "" && !strings.Contains(name, "$") && !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	visit(at)
	return found
}

// instructions returns a Dockerfile's lines without comments, continued lines as one.
func instructions(text string) []string {
	var out []string
	var open strings.Builder
	escape := `\`
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if comment, ok := strings.CutPrefix(line, "#"); ok {
			if key, value, ok := strings.Cut(comment, "="); ok && strings.EqualFold(strings.TrimSpace(key), "escape") && len(out) == 0 && open.Len() == 0 {
				escape = strings.TrimSpace(value)
			}
			continue
		}
		if start, ok := strings.CutSuffix(line, escape); ok {
			open.WriteString(start + " ")
			continue
		}
		open.WriteString(line)
		if open.Len() > 0 {
			out = append(out, strings.TrimSpace(open.String()))
		}
		open.Reset()
	}
	if open.Len() > 0 {
		out = append(out, strings.TrimSpace(open.String()))
	}
	return out
}

var variable = regexp.MustCompile(`\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?:(:[-+])([^}]*))?\})`)

// expand replaces arguments in a text with their values, in the forms that FROM supports: $X, ${X}, ${X:-else} and ${X:+then}. An
// argument without a value stays.
func expand(text string, values map[string]string) string {
	return variable.ReplaceAllStringFunc(text, func(found string) string {
		part := variable.FindStringSubmatch(found)
		value := values[part[1]+part[2]]
		switch {
		case part[3] == ":-" && value == "":
			return part[4]
		case part[3] == ":+" && value != "":
			return part[4]
		case part[3] == ":+":
			return ""
		case value == "":
			return found
		}
		return value
	})
}

// ErrNoBase means that an image from which a build starts cannot be pulled.
var ErrNoBase = errors.New("a base image is missing")

// Provide brings the images that a build starts from into the engine's storage: from the node's containerd (nil if there is none)
// and the storages of this machine's other engines, or else from their registry. The error is one line, with the command that
// provides the image.
func Provide(ctx context.Context, in Engine, source Source, from Store, note func(string)) error {
	e, ok := in.(engine)
	if !ok || e.program == "docker" { // which pulls by itself, and from Docker Hub
		return nil
	}
	names, err := source.Bases()
	if err != nil {
		return err
	}
	for _, name := range names {
		if has, err := e.Has(ctx, name); err != nil || has {
			if err != nil {
				return err
			}
			continue
		}
		full, err := reference.ParseDockerRef(name)
		if err != nil {
			return fmt.Errorf("base image %s: %w", name, err)
		}
		if found, err := e.takeOver(ctx, full.String(), from, note); err != nil || found {
			if err != nil {
				return err
			}
			continue
		}
		note("pulling " + name)
		if err := e.run(ctx, io.Discard, "pull "+name, "pull", "--quiet", name); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return noBase(e, name, full.String(), err)
		}
	}
	return nil
}

// noBase returns the error for an image that cannot be pulled.
func noBase(e engine, name, full string, err error) error {
	why := err.Error()
	var failed *BuildError
	if errors.As(err, &failed) {
		why = strings.TrimPrefix(lastLine([]byte(failed.Output)), "Error: ")
	}
	advice := fmt.Sprintf("bring it as a file: `%s pull oci-archive:FILE`", e.program)
	if lang := baseimage.Lang(full); lang != "" {
		advice = fmt.Sprintf("build it from Debian packages: `polymesh image bases --lang %s`", lang)
	}
	return fmt.Errorf("%w: %s cannot be pulled; %s (%s)", ErrNoBase, name, advice, why)
}

// takeOver copies an image, by its full name, from another storage on this machine. It is not an error if that one cannot be read,
// or does not have the image: a registry may have it.
func (e engine) takeOver(ctx context.Context, full string, from Store, note func(string)) (bool, error) {
	dir, err := os.MkdirTemp("", "polymesh-base-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	archive := filepath.Join(dir, "image.tar")
	for _, place := range []struct {
		name, form string
		export     func() bool
	}{
		{"this machine's node", "oci-archive", func() bool {
			if from == nil {
				return false
			}
			has, err := from.Has(ctx, full)
			return err == nil && has && from.Export(ctx, full, archive) == nil
		}},
		{"the storage of the user who called sudo", "oci-archive", func() bool { return exportAs(ctx, os.Getenv("SUDO_USER"), dir, full, archive) }},
		{"docker", "docker-archive", func() bool {
			d := engine{"docker"}
			if d.check(ctx) != nil {
				return false
			}
			has, err := d.Has(ctx, full)
			return err == nil && has && d.Save(ctx, full, archive, io.Discard) == nil
		}},
	} {
		if err := ctx.Err(); err != nil {
			return false, context.Cause(ctx)
		}
		if !place.export() {
			os.Remove(archive)
			continue
		}
		note("taking " + full + " from " + place.name)
		// Use the id: the archive may not contain a name.
		id, err := e.output(ctx, "pull", "--quiet", place.form+":"+archive)
		if err == nil {
			_, err = e.output(ctx, "tag", id, full)
		}
		if err != nil {
			return false, fmt.Errorf("copy base image %s from %s: %w", full, place.name, err)
		}
		return true, nil
	}
	return false, nil
}

// exportAs writes an image to an archive from the storage of another user, as that user; this program runs as root. dir is an
// empty folder.
func exportAs(ctx context.Context, name, dir, full, archive string) bool {
	if name == "" || name == "root" || os.Geteuid() != 0 {
		return false
	}
	u, err := user.Lookup(name)
	if err != nil {
		return false
	}
	uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
	if uidErr != nil || gidErr != nil || os.Chown(dir, int(uid), int(gid)) != nil {
		return false
	}
	if info, err := os.Stat(filepath.Join(u.HomeDir, ".local", "share", "containers", "storage")); err != nil || !info.IsDir() {
		return false
	}
	cmd := exec.CommandContext(ctx, "buildah", "push", "--quiet", full, "oci-archive:"+archive+":"+full)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + u.HomeDir, "USER=" + name, "XDG_RUNTIME_DIR=" + filepath.Join("/run/user", u.Uid)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	return cmd.Run() == nil
}

// output runs the program and returns what it prints.
func (e engine) output(ctx context.Context, args ...string) (string, error) {
	env, cleanup, err := e.environ()
	if err != nil {
		return "", err
	}
	defer cleanup()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, e.program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", e.program, args[0], err, lastLine(errOut.Bytes()))
	}
	return lastLine(out.Bytes()), nil
}
