package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

const onePod = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "echo", "namespace": "default"}, "spec": {"containers": [
	{"name": "echo", "image": "` + echoImage + `", "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1}}]}}`

// small tests a small machine. If it does not work, that is a result too, not a failure.
func (b *bench) small(ctx context.Context, o node.Options, id setting, use func(*node.Node) error) error {
	return b.on(ctx, o, func(n *node.Node) error {
		if err := giveDisk(ctx, n); err != nil {
			return err
		}
		begin := time.Now()
		if err := n.Start(ctx); err != nil {
			return err
		}
		bounded, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		err := n.Ready(bounded)
		if err == nil {
			b.results.add(figureID(string(id)+" ready"), time.Since(begin).Seconds())
			err = use(n)
		}
		if err == nil {
			b.results.add(figureID(string(id)+" in use"), time.Since(begin).Seconds())
			err = wait(ctx, b.settle)
		}
		if err == nil {
			// Still healthy after a while, without processes killed and restarted.
			err = n.Ready(bounded)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		usage, usageErr := n.Usage()
		if usageErr != nil {
			return errors.Join(err, usageErr)
		}
		b.results.add(figureID(string(id)+" anonymous"), float64(usage.Anonymous)/1e6)
		b.results.add(figureID(string(id)+" cache"), float64(usage.Cache)/1e6)
		b.results.add(figureID(string(id)+" killed"), float64(usage.OOMKills))
		verdict := "yes"
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			verdict = "no: " + firstLine(err)
		}
		b.results.verdict(id, verdict)
		return nil
	})
}

// giveDisk gives a node its own disk for its data, a file behind a loop device, with the kernel's default read-ahead.
// When memory is short, programs are read from disk repeatedly: the read-ahead determines what fits. Removing the node
// unmounts the disk, which also removes the device.
func giveDisk(ctx context.Context, n *node.Node) error {
	const size, readAhead = 12 << 30, 128 // bytes, of which only what is written takes room; KB
	image := filepath.Join(n.Dir, "disk")
	file, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(size), file.Close()); err != nil {
		return err
	}
	if err := os.Mkdir(n.DataDir(), 0o700); err != nil {
		return err
	}
	command := func(name string, args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out)), nil
	}
	if _, err := command("mkfs.ext4", "-q", "-F", image); err != nil {
		return err
	}
	// Without direct I/O the file's pages would be cached twice.
	device, err := command("losetup", "--find", "--show", "--direct-io=on", image)
	if err != nil {
		return err
	}
	_, err = command("mount", device, n.DataDir())
	// A mounted device is removed when it is unmounted.
	_, detachErr := command("losetup", "--detach", device)
	if err := errors.Join(err, detachErr); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join("/sys/block", filepath.Base(device), "queue", "read_ahead_kb"), []byte(strconv.Itoa(readAhead)), 0o644)
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

func (b *bench) smallBare(ctx context.Context) error {
	o := node.Options{Args: []string{"--disable", "istio"}, Limits: node.Limits{CPUs: 1, Memory: 512e6}}
	return b.small(ctx, o, smallBare, func(n *node.Node) error {
		if err := b.importArchives(ctx, n, "e2e/echo.tar"); err != nil {
			return err
		}
		if err := apply(ctx, n, onePod); err != nil {
			return err
		}
		return polymesh(ctx, n, "kubectl", "wait", "--for=condition=Ready", "pod/echo", "--timeout=180s")
	})
}

func (b *bench) smallMesh(ctx context.Context) error {
	o := node.Options{Args: []string{"--mesh-profile", "demo"}, Limits: node.Limits{CPUs: 2, Memory: 2e9}}
	return b.small(ctx, o, smallMesh, func(n *node.Node) error { return b.deployApp(ctx, n) })
}
