package datadir

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/config"
)

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "observe")
	require.NoError(t, os.Mkdir(path, 0o755))
	d, err := Open(path, "/run/observe.sock")
	require.NoError(t, err)
	for _, dir := range []string{path, d.Metrics(), d.Logs(), d.Traces(), d.Meta()} {
		info, err := os.Stat(dir)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o700), info.Mode().Perm(), dir)
	}
	var h Holder
	text, err := os.ReadFile(filepath.Join(path, LockName))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &h))
	require.Equal(t, Holder{os.Getpid(), started(), "/run/observe.sock"}, h)
	require.NotZero(t, h.Started)

	_, err = Open(path, "/elsewhere")
	var held *HeldError
	require.ErrorAs(t, err, &held)
	require.Equal(t, h, held.Holder)
	require.NotContains(t, err.Error(), "\n")
	d.Close()

	// What a killed process has left does not keep the next one out.
	d, err = Open(path, "/run/observe.sock")
	require.NoError(t, err)
	d.Close()
}

// A process that only looks whether the lock is held does not keep the store from starting.
func TestOpenWhileSomeoneLooks(t *testing.T) {
	path := t.TempDir()
	f, err := os.Create(filepath.Join(path, LockName))
	require.NoError(t, err)
	require.NoError(t, unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB))
	opened := make(chan error)
	go func() {
		d, err := Open(path, "")
		if err == nil {
			d.Close()
		}
		opened <- err
	}()
	f.Close()
	require.NoError(t, <-opened)
}

func TestOpenWhatIsNotAStore(t *testing.T) {
	for text, want := range map[string]string{"2\n": "later version of Polymesh", "x": "contains no version"} {
		path := t.TempDir()
		require.NoError(t, os.Mkdir(filepath.Join(path, "meta"), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(path, "meta", formatName), []byte(text), 0o600))
		_, err := Open(path, "")
		require.ErrorContains(t, err, want)
		require.NoDirExists(t, filepath.Join(path, "metrics"))
	}
	// A power failure can leave an empty one.
	empty := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(empty, "meta"), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(empty, "logs"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(empty, "meta", formatName), nil, 0o600))
	d, err := Open(empty, "")
	require.NoError(t, err)
	d.Close()

	path := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(path, "letter.txt"), nil, 0o600))
	_, err = Open(path, "")
	require.ErrorContains(t, err, `contains "letter.txt"`)
	require.NoDirExists(t, filepath.Join(path, "meta"))
	link := filepath.Join(t.TempDir(), LockName)
	require.NoError(t, os.Symlink("/etc/hostname", link))
	_, err = Open(filepath.Dir(link), "")
	require.True(t, errors.Is(err, unix.ELOOP), err)
}

// Who only reads needs no lock, and changes nothing.
func TestOpenReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "observe")
	_, err := OpenReadOnly(path)
	require.ErrorContains(t, err, "is not the folder of a store")
	require.NoDirExists(t, path)
	d, err := Open(path, "")
	require.NoError(t, err)
	defer d.Close()
	reader, err := OpenReadOnly(path)
	require.NoError(t, err)
	require.Equal(t, d.Logs(), reader.Logs())
	reader.Close()
	require.NoError(t, os.WriteFile(filepath.Join(d.Meta(), formatName), []byte("2\n"), 0o600))
	_, err = OpenReadOnly(path)
	require.ErrorContains(t, err, "later version of Polymesh")
}

func TestBudget(t *testing.T) {
	const gib = config.Size(1 << 30)
	require.Equal(t, Budget{Total: 10 * gib, Metrics: 4 * gib, Logs: 4 * gib, Traces: 2 * gib, MinFree: gib}, budget(10*gib, 100*gib))
	require.Equal(t, 2*gib, budget(0, 1000*gib).Total)
	require.Equal(t, gib/2, budget(0, 10*gib).Total)
	require.Equal(t, gib/2, budget(gib, 10*gib).MinFree)
	require.Equal(t, config.MinDisk, budget(0, gib).Total)

	d, err := Open(t.TempDir(), "")
	require.NoError(t, err)
	defer d.Close()
	b, err := d.Budget(gib)
	require.NoError(t, err)
	require.Equal(t, gib, b.Total)
	require.Positive(t, b.MinFree)
}
