package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// prepareLimit is the time to prepare a data dir, next to other nodes that start.
const prepareLimit = 5 * time.Minute

// prepared are the parts of a data dir that do not depend on the node: the unpacked programs, the images in containerd, and the record
// that they are complete.
var prepared = []string{"data", "agent/containerd", "agent/session.json"}

// prepare creates the node's data dir with the programs and images of the program under test, as a server leaves them. Unpacking and
// importing them is most of the work of a first start, and the same for every node. The files of programs and images are hard links:
// they are never changed, only replaced.
//
// Nodes that no test has created, and those with another program or with their own disk, start from nothing.
func (n *Node) prepare(ctx context.Context) error {
	if _, err := os.Stat(n.DataDir()); err == nil || !n.prepares || n.opts.FirstStart || n.opts.Program != "" || n.opts.Disk != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, prepareLimit)
	defer cancel()
	source, err := preparedDir(ctx, n.program)
	if err == nil {
		err = n.copyPrepared(source)
	}
	if err != nil {
		return fmt.Errorf("prepare the data dir of node %s: %w", n.Name, err)
	}
	return nil
}

func (n *Node) copyPrepared(source layout.DataDir) error {
	if err := os.MkdirAll(n.Layout().Path("agent"), 0o755); err != nil {
		return err
	}
	for _, part := range prepared {
		if err := linkTree(source.Path(part), n.Layout().Path(part)); err != nil {
			return err
		}
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	text, err := json.Marshal(datadir.Marker{ID: hex.EncodeToString(id)})
	if err != nil {
		return err
	}
	return os.WriteFile(n.Layout().Path(datadir.MarkerName), text, 0o600)
}

// linkTree copies a folder, or a file. Its files are hard links, except for databases, which containerd changes in place.
func linkTree(from, to string) error {
	if err := tool("cp", "--archive", "--link", from, to); err != nil {
		// Another file system.
		if err := os.RemoveAll(to); err != nil {
			return err
		}
		return tool("cp", "--archive", "--reflink=auto", from, to)
	}
	return filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "blobs" || d.Name() == "snapshots"):
			return fs.SkipDir
		case !d.Type().IsRegular() || filepath.Ext(path) != ".db" && filepath.Ext(path) != ".json":
			return nil
		}
		return errors.Join(tool("cp", "--archive", path, path+".copy"), os.Rename(path+".copy", path))
	})
}

// Prepare prepares the data dir from which nodes start, unless there is one of the program under test. Without it, the first node does.
func Prepare(ctx context.Context) error {
	program, err := Program()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, prepareLimit)
	defer cancel()
	_, err = preparedDir(ctx, program)
	return err
}

// preparedDir returns the data dir from which nodes with this program start. It is created by a server if there is none of this
// program. Test programs that run at the same time create it once.
func preparedDir(ctx context.Context, program string) (_ layout.DataDir, err error) {
	top, err := Top()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(top, ".build", "e2e", "prepared")
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	id, err := exec.CommandContext(ctx, "sha256sum", program).Output()
	if err != nil {
		return "", fmt.Errorf("read %s: %w", program, err)
	}
	of := filepath.Join(dir, "of")
	if made, err := os.ReadFile(of); err == nil && string(made) == string(id) {
		return layout.DataDir(dir), nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	n, err := New(Options{Args: []string{"--disable", "coredns,metrics-server,local-storage,servicelb,istio"}})
	if err != nil {
		return "", err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, n.Close(closing))
	}()
	if err := n.Start(ctx); err != nil {
		return "", err
	}
	if err := n.componentReady(ctx, "images"); err != nil {
		return "", err
	}
	if err := n.Stop(ctx); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(dir, "agent"), 0o755); err != nil {
		return "", err
	}
	for _, part := range prepared {
		if err := tool("mv", n.Layout().Path(part), filepath.Join(dir, part)); err != nil {
			return "", err
		}
	}
	// A node's log begins with its own start.
	if err := os.Remove(filepath.Join(dir, "agent", "containerd", "containerd.log")); err != nil {
		return "", err
	}
	return layout.DataDir(dir), os.WriteFile(of, id, 0o600)
}

// componentReady waits until a component is ready.
func (n *Node) componentReady(ctx context.Context, name string) error {
	state := "unknown"
	for {
		if report, err := n.Report(ctx); err == nil {
			for _, c := range report.Components {
				if c.Name == name {
					state = strings.TrimSpace(string(c.State) + " " + c.Message)
				}
				if c.Name == name && c.State == "Ready" {
					return nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s of node %s is %s: %w", name, n.Name, state, ctx.Err())
		case <-n.Exited():
			return fmt.Errorf("the server of node %s has ended (%w); its log ends with:\n%s", n.Name, n.exitError(), tail(n.Log(), 15))
		case <-time.After(poll):
		}
	}
}
