package checkpoint

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// disk is a store of which a test says what is on disk.
type disk struct{ mark, durable uint64 }

func (d *disk) Mark() uint64    { return d.mark }
func (d *disk) Durable() uint64 { return d.durable }

// Whenever the process is killed, what the file says was read is stored.
func TestNeverAheadOfTheStore(t *testing.T) {
	store := &disk{}
	dir := filepath.Join(t.TempDir(), "state")
	require.NoError(t, os.Mkdir(dir, 0o700))
	path := filepath.Join(dir, "places")
	f := New[int](path, store)
	saved := func() int {
		n, found, err := New[int](path, store).Load()
		require.NoError(t, err)
		require.Equal(t, n > 0, found)
		return n
	}
	read, changed := 0, true
	save := func() *int {
		written, err := f.Save(func() *int {
			if !changed {
				return nil
			}
			changed = false
			n := read
			return &n
		})
		require.NoError(t, err)
		return written
	}
	require.Zero(t, saved())
	read, store.mark = 10, 5
	require.Nil(t, save())
	require.Zero(t, saved(), "what was read is in memory")
	read, changed, store.mark, store.durable = 20, true, 9, 4
	require.Nil(t, save())
	require.Zero(t, saved())

	// The disk is full, or the folder is gone: the state is written later.
	store.durable = 5
	require.NoError(t, os.Rename(dir, dir+".away"))
	_, err := f.Save(func() *int { t.Error("the state of before is not written yet"); return nil })
	require.Error(t, err)
	require.NoError(t, os.Rename(dir+".away", dir))

	require.Equal(t, 10, *save())
	require.Equal(t, 10, saved(), "as far as what is on disk")
	require.Nil(t, save())
	require.Equal(t, 10, saved())
	store.durable = 9
	require.Equal(t, 20, *save())
	require.Equal(t, 20, saved())
	require.Nil(t, save(), "nothing has changed")

	require.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
	n, found, err := New[int](path, store).Load()
	require.ErrorContains(t, err, path)
	require.False(t, found)
	require.Zero(t, n)
}
