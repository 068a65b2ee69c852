package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/distribution/reference"
)

// EngineNames returns the programs that Find supports, in the order in which it searches for them.
func EngineNames() []string { return []string{"buildah", "podman", "docker"} }

// Find returns the engine of that name, or the first that works here if name is empty.
func Find(ctx context.Context, name string) (Engine, error) {
	if name != "" {
		if !slices.Contains(EngineNames(), name) {
			return nil, fmt.Errorf("--engine %q is not one of %s", name, strings.Join(EngineNames(), ", "))
		}
		e := engine{program: name}
		if err := e.check(ctx); err != nil {
			return nil, err
		}
		return e, nil
	}
	var problems []string
	for _, name := range EngineNames() {
		e := engine{program: name}
		err := e.check(ctx)
		if err == nil {
			return e, nil
		}
		problems = append(problems, err.Error())
	}
	return nil, fmt.Errorf("nothing here builds images: %s. On Debian and Ubuntu: apt-get install buildah slirp4netns", strings.Join(problems, "; "))
}

// engine runs one of the programs. Their command lines are the same, except for what the methods handle.
type engine struct{ program string }

// Name implements Engine.
func (e engine) Name() string { return e.program }

func (e engine) check(ctx context.Context) error {
	if _, err := exec.LookPath(e.program); err != nil {
		return fmt.Errorf("%s is not installed", e.program)
	}
	// The client needs a server; the other programs do not.
	if e.program == "docker" {
		if out, err := exec.CommandContext(ctx, "docker", "version", "--format", "{{.Server.Version}}").CombinedOutput(); err != nil {
			return fmt.Errorf("docker has no engine (%s)", lastLine(out))
		}
	}
	return nil
}

// Has implements Engine.
func (e engine) Has(ctx context.Context, ref string) (bool, error) {
	id, err := e.ID(ctx, ref)
	return id != "", err
}

// ID implements Engine.
func (e engine) ID(ctx context.Context, ref string) (string, error) {
	args := []string{"image", "inspect", "--format", "{{.Id}}", ref}
	if e.program == "buildah" {
		args = []string{"inspect", "--type", "image", "--format", "{{.FromImageID}}", ref}
	}
	env, cleanup, err := e.environ()
	if err != nil {
		return "", err
	}
	defer cleanup()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, e.program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, &out, &errOut
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return strings.TrimPrefix(lastLine(out.Bytes()), "sha256:"), nil
	case errors.As(err, &exit) && ctx.Err() == nil:
		// None of the three has an exit code for "not there".
		text := strings.ToLower(errOut.String())
		for _, message := range []string{"image not known", "no such image", "failed to find image", "not found"} {
			if strings.Contains(text, message) {
				return "", nil
			}
		}
	}
	return "", fmt.Errorf("%s: look for image %s: %w: %s", e.program, ref, err, lastLine(errOut.Bytes()))
}

// Build implements Engine.
func (e engine) Build(ctx context.Context, ref string, source Source, log io.Writer) error {
	args := []string{"build", "--file", filepath.Join(source.Context, source.Dockerfile), "--tag", ref}
	if source.Target != "" {
		args = append(args, "--target", source.Target)
	}
	if source.IDFile != "" {
		args = append(args, "--iidfile", source.IDFile)
	}
	flags, values, err := buildArgs(source.Args)
	if err != nil {
		return err
	}
	args = append(args, flags...)
	env, cleanup, err := e.environ()
	if err != nil {
		return err
	}
	defer cleanup()
	env = append(env, values...)
	if e.program == "docker" {
		if len(source.Mounts)+len(source.Settings) > 0 {
			return errors.New("docker cannot mount files into a build: use buildah or podman (--engine), or RUN --mount in the Dockerfile")
		}
		// Its builds run in containers, separate from this machine's processes and loopback.
		if source.Network == NetworkHost || source.Network == NetworkNone {
			args = append(args, "--network", source.Network)
		}
		return e.runIn(ctx, env, log, "build "+ref, append(args, source.Context)...)
	}
	settings, cleanupSettings, err := settings(source.Settings)
	if err != nil {
		return err
	}
	defer cleanupSettings()
	// Layers are kept, so that a changed line only builds what comes after it. chroot needs no permissions that a container may lack;
	// runConfined isolates what it does not, so the host's network is that of the namespace. A process with CAP_SYS_CHROOT could leave
	// a chroot.
	args = append(args, "--layers", "--pull=false", "--isolation", "chroot", "--network", "host", "--cap-drop", "CAP_SYS_CHROOT", "--format", "oci")
	for _, mount := range slices.Concat(authorities(), settings, source.Mounts) {
		args = append(args, "--volume", mount+":ro")
	}
	err = e.runConfined(ctx, log, "build "+ref, source.Network, env, append(args, source.Context)...)
	if names := unused(source.Settings); err != nil && len(names) > 0 {
		var failed *BuildError
		if errors.As(err, &failed) {
			failed.Advice = "If a download failed: this machine has settings of " + strings.Join(names, ", ") +
				", which a build gets only when requested: --build-settings " + strings.Join(names, ",")
		}
	}
	return err
}

// Save implements Engine.
func (e engine) Save(ctx context.Context, ref, file string, log io.Writer) error {
	switch e.program {
	case "buildah":
		return e.run(ctx, log, "save "+ref, "push", "--quiet", ref, "oci-archive:"+file+":"+ref)
	case "podman":
		return e.run(ctx, log, "save "+ref, "save", "--quiet", "--format", "oci-archive", "--output", file, ref)
	}
	return e.run(ctx, log, "save "+ref, "save", "--output", file, ref)
}

// Push implements Engine.
func (e engine) Push(ctx context.Context, ref string, log io.Writer) error {
	if err := e.run(ctx, log, "push "+ref, "push", ref); err != nil {
		if named, parseErr := reference.ParseNormalizedNamed(ref); parseErr == nil {
			return fmt.Errorf("%w (log in with `%s login %s` if it requires a login)", err, e.program, reference.Domain(named))
		}
		return err
	}
	return nil
}

// run runs the program. Its output goes to log, and the end of it into the error.
func (e engine) run(ctx context.Context, log io.Writer, doing string, args ...string) error {
	env, cleanup, err := e.environ()
	if err != nil {
		return err
	}
	defer cleanup()
	return e.runIn(ctx, env, log, doing, args...)
}

// runIn is like run, with an environment.
func (e engine) runIn(ctx context.Context, env []string, log io.Writer, doing string, args ...string) error {
	var tail bytes.Buffer
	cmd := exec.CommandContext(ctx, e.program, args...)
	cmd.Env = env
	cmd.Stdout = io.MultiWriter(log, &tail)
	cmd.Stderr = cmd.Stdout
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
		}
		return &BuildError{Doing: doing, Err: err, Output: tail.String()}
	}
	return nil
}

// BuildError is the error of an engine's program, with its output.
type BuildError struct {
	Doing  string
	Err    error
	Output string
	// Advice is what the user can do; it may be empty.
	Advice string
}

// shown is how many lines of a build's output an error contains.
const shown = 20

func (e *BuildError) Error() string {
	lines := strings.Split(strings.TrimSpace(e.Output), "\n")
	if len(lines) > shown {
		lines = lines[len(lines)-shown:]
	}
	text := fmt.Sprintf("%s: %v\n    %s", e.Doing, e.Err, strings.Join(lines, "\n    "))
	if e.Advice != "" {
		text += "\n" + e.Advice
	}
	return text
}

func (e *BuildError) Unwrap() error { return e.Err }

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
