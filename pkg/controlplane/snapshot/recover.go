package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
)

const (
	stagingName = "restore"
	planName    = "restore.json"
	noteName    = "restored.json"
	// restoredConfig is the config file of the snapshot that was restored last, in the server's folder.
	restoredConfig = "restored-config.yaml"
	// resetName is the file that shows that the cluster was reset, until the next normal start. The name is K3s's.
	resetName = "reset-flag"
)

func resetFlag(dir layout.DataDir) string { return dir.Server("db", resetName) }

func staging(dir layout.DataDir) string { return dir.Server(stagingName) }

// plan is what a restore replaces. Once it is on disk, a restore is completed, whatever interrupts it.
type plan struct {
	// Aside is the folder for what is replaced.
	Aside string `json:"aside"`
	// Out are the names in the server's folder that are put aside, In those that replace them.
	Out []string `json:"out"`
	In  []string `json:"in"`
}

// replaced are the names in the server's folder that make up a cluster.
var replaced = regexp.MustCompile(`^(db|tls|cred|([a-z]+-)?token)$`)

// plan writes the plan of a staged restore.
func (s *Snapshots) plan(r *Restored, c change, now time.Time) error {
	dir := s.o.DataDir
	p := plan{Aside: c.before + "-" + now.UTC().Format(timeFormat)}
	present, err := os.ReadDir(dir.Server())
	if err != nil {
		return err
	}
	for _, e := range present {
		if replaced.MatchString(e.Name()) && (e.Name() == "db" || !c.inPlace) {
			p.Out = append(p.Out, e.Name())
		}
	}
	staged := filepath.Join(staging(dir), configFile)
	if _, err := os.Lstat(staged); err == nil {
		if err := os.Rename(staged, filepath.Join(staging(dir), "server", restoredConfig)); err != nil {
			return err
		}
	}
	incoming, err := os.ReadDir(filepath.Join(staging(dir), "server"))
	if err != nil {
		return err
	}
	for _, e := range incoming {
		p.In = append(p.In, e.Name())
	}
	if len(p.Out) > 0 {
		r.Aside = dir.Server(p.Aside)
	}
	if err := atomicfile.SyncFilesystem(staging(dir)); err != nil {
		return err
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return atomicfile.Write(dir.Server(planName), text, 0o600)
}

// Recover completes a restore that was interrupted while it replaced files, and reports whether there was one. It is called with
// the lock of the data dir, before anything in it is read. One that was interrupted earlier has changed nothing.
func Recover(dir layout.DataDir) (bool, error) { return recoverWith(dir, atomicfile.Rename) }

// recoverWith is Recover with a function that renames, which a test interrupts.
func recoverWith(dir layout.DataDir, rename func(from, to string) error) (bool, error) {
	text, err := os.ReadFile(dir.Server(planName))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var p plan
	if err := json.Unmarshal(text, &p); err != nil {
		return false, fmt.Errorf("complete the restore of a snapshot: %s: %w", dir.Server(planName), err)
	}
	if err := p.complete(dir, rename); err != nil {
		return false, fmt.Errorf("complete the restore of a snapshot: %w", err)
	}
	return true, nil
}

// complete moves files until all are in place. Each step is skipped if it was done before.
func (p plan) complete(dir layout.DataDir, rename func(from, to string) error) error {
	if len(p.Out) > 0 {
		if err := atomicfile.MkdirAll(dir.Server(p.Aside), 0o700); err != nil {
			return err
		}
	}
	// All old files go before the first new one comes, so a file that is not aside yet is an old one.
	for _, name := range p.Out {
		if aside := dir.Server(p.Aside, name); !exists(aside) {
			if err := rename(dir.Server(name), aside); err != nil {
				return err
			}
		}
	}
	for _, name := range p.In {
		staged := filepath.Join(staging(dir), "server", name)
		if !exists(staged) && exists(dir.Server(name)) {
			continue
		}
		if err := rename(staged, dir.Server(name)); err != nil {
			return err
		}
	}
	if err := os.Remove(dir.Server(planName)); err != nil {
		return err
	}
	if err := atomicfile.SyncDir(dir.Server()); err != nil {
		return err
	}
	return os.RemoveAll(staging(dir))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// note is what the next start of the server has to know about a restore.
type note struct {
	Snapshot string    `json:"snapshot"`
	Node     string    `json:"node"`
	Created  time.Time `json:"created"`
	Restored time.Time `json:"restored"`
}
