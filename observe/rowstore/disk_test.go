package rowstore

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/disktest"
)

func TestFullDisk(t *testing.T) {
	disk := disktest.Mount(t, "96m")
	s := open(t, Options{Dir: filepath.Join(disk, "rows"), MinFreeBytes: 40 << 20})
	require.NoError(t, s.Append([]Row{line(time.Now(), "p", "before")}))

	big := filepath.Join(disk, "big")
	require.NoError(t, os.WriteFile(big, make([]byte, 60<<20), 0o600))
	require.Eventually(t, func() bool { return s.Stats().ReadOnly }, 10*time.Second, 20*time.Millisecond)
	err := s.Append([]Row{line(time.Now(), "p", "while")})
	require.ErrorIs(t, err, ErrReadOnly)
	require.ErrorContains(t, err, "40 MiB")
	require.Len(t, all(t, s, "*"), 1, "reading goes on")
	require.Eventually(t, func() bool { return s.Durable() == 1 }, 20*time.Second, 20*time.Millisecond, "what was accepted is written")

	// It opens on a disk that is short, too.
	require.NoError(t, s.Close())
	s = open(t, Options{Dir: filepath.Join(disk, "rows"), MinFreeBytes: 40 << 20})
	require.ErrorIs(t, s.Append([]Row{line(time.Now(), "p", "still")}), ErrReadOnly)
	require.Len(t, all(t, s, "*"), 1)

	require.NoError(t, os.Remove(big))
	require.Eventually(t, func() bool { return s.Append([]Row{line(time.Now(), "p", "after")}) == nil }, 10*time.Second, 20*time.Millisecond)
	require.Len(t, all(t, s, "*"), 2)
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(Options{Dir: filepath.Join(dir, "none"), ReadOnly: true})
	require.ErrorContains(t, err, "there is no store")

	s := open(t, Options{Dir: dir})
	for i := range 5 {
		require.NoError(t, s.Append([]Row{line(time.Now(), "p", fmt.Sprint(i)), line(time.Now().Add(-24*time.Hour), "p", fmt.Sprint("old ", i))}))
	}
	require.Eventually(t, func() bool { return s.Durable() == 10 }, 20*time.Second, 20*time.Millisecond)

	temp := t.TempDir()
	first := open(t, Options{Dir: dir, ReadOnly: true, Temp: temp})
	second := open(t, Options{Dir: dir, ReadOnly: true, Temp: temp})
	for _, reader := range []*Store{first, second} {
		require.Len(t, all(t, reader, `{pod="p"}`), 10)
		require.ErrorIs(t, reader.Append([]Row{line(time.Now(), "p", "x")}), ErrReadOnly)
		require.True(t, reader.Stats().ReadOnly)
	}
	require.NoError(t, s.Append([]Row{line(time.Now(), "p", "later")}))
	require.NoError(t, s.Close())
	require.Len(t, all(t, first, "*"), 10, "it is what was there")

	// What was merged away meanwhile is still read.
	require.NoError(t, os.RemoveAll(filepath.Join(dir, partitionsDir)))
	require.Len(t, all(t, second, "old"), 5)

	require.NoError(t, first.Close())
	require.NoError(t, second.Close())
	left, err := os.ReadDir(temp)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestReadOnlyDisk(t *testing.T) {
	dir := disktest.Mount(t, "64m")
	s := open(t, Options{Dir: dir})
	require.NoError(t, s.Append([]Row{line(time.Now(), "p", "a")}))
	require.NoError(t, s.Close())
	require.NoError(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))

	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	reader := open(t, Options{Dir: dir, ReadOnly: true})
	require.Len(t, all(t, reader, "*"), 1)
	require.NoError(t, reader.Close())
	left, err := os.ReadDir(tmp)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestReadWhileWriting(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.Append([]Row{line(time.Now(), fmt.Sprint("p", i%20), fmt.Sprint(i))}); err != nil {
				t.Error(err)
				return
			}
			s.Flush()
		}
	}()
	require.Eventually(t, func() bool { return s.Durable() > 0 }, 20*time.Second, 20*time.Millisecond)
	last := 0
	for range 20 {
		reader, err := Open(Options{Dir: dir, ReadOnly: true})
		require.NoError(t, err)
		n := len(all(t, reader, "*"))
		require.GreaterOrEqual(t, n, last)
		last = n
		require.NoError(t, reader.Close())
	}
	close(stop)
	<-done
	require.Positive(t, last)
}

// TestBound writes many times what the store may hold.
func TestBound(t *testing.T) {
	if testing.Short() {
		t.Skip("runs for a minute")
	}
	dir := t.TempDir()
	const limit = 24 << 20
	removed := 0
	s := open(t, Options{Dir: dir, MaxBytes: limit, OnRemoved: func(r Removed) {
		removed++
		t.Logf("had %d KiB, rows until %s are gone, %v", r.Bytes>>10, r.Until.Format(time.TimeOnly), r.Err)
	}})
	peak := int64(0)
	var first, last time.Time
	written := 0
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline) && removed < 10; {
		rows := make([]Row, 500)
		for i := range rows {
			last = time.Now()
			rows[i] = line(last, fmt.Sprint("p", i%5), fmt.Sprintf("a line with %x and %x", rand.Uint64(), rand.Uint64()))
		}
		if first.IsZero() {
			first = last
		}
		require.NoError(t, s.Append(rows))
		written += len(rows)
		used, err := diskUsage(dir)
		require.NoError(t, err)
		peak = max(peak, used)
	}
	t.Logf("%d rows written, %d trims, at most %d KiB of %d on disk", written, removed, peak>>10, limit>>10)
	require.Positive(t, removed)
	require.LessOrEqual(t, peak, int64(limit))
	rows := all(t, s, "*")
	require.Less(t, len(rows), written)
	require.NotEmpty(t, rows)
	newest := time.Time{}
	for _, r := range rows {
		if r.Time.After(newest) {
			newest = r.Time
		}
	}
	require.WithinDuration(t, last, newest, 10*time.Second, "the newest rows are the ones that stay")
}

func TestDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	now := time.Now().UTC()
	yesterday := now.Add(-24 * time.Hour)
	require.NoError(t, s.Append([]Row{line(now, "p", "today"), line(yesterday, "p", "yesterday")}))
	require.NoError(t, s.Close())
	day := filepath.Join(dir, partitionsDir, yesterday.Format("20060102"))
	names, err := parts(filepath.Join(day, dataDir))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(day, dataDir, names[0], metadataFile), nil, 0o600))

	// A reader leaves the day out and changes nothing, whatever is damaged.
	for what, damage := range map[string]func(string){
		"a part": func(string) {},
		"the list of parts": func(copied string) {
			require.NoError(t, os.WriteFile(filepath.Join(copied, partitionsDir, yesterday.Format("20060102"), indexDir, partsFile), []byte("["), 0o600))
		},
		"a part that is gone": func(copied string) {
			require.NoError(t, os.RemoveAll(filepath.Join(copied, partitionsDir, yesterday.Format("20060102"), dataDir, names[0])))
		},
	} {
		copied := filepath.Join(t.TempDir(), "copy")
		require.NoError(t, os.CopyFS(copied, os.DirFS(dir)))
		damage(copied)
		var left []Removed
		reader := open(t, Options{Dir: copied, ReadOnly: true, OnRemoved: func(r Removed) { left = append(left, r) }})
		require.Len(t, all(t, reader, "*"), 1, what)
		require.Len(t, left, 1, what)
		require.ErrorContains(t, left[0].Err, "damaged and left out", what)
	}

	var removed []Removed
	s = open(t, Options{Dir: dir, OnRemoved: func(r Removed) { removed = append(removed, r) }})
	rows := all(t, s, "*")
	require.Len(t, rows, 1, "the other day is there")
	require.Len(t, removed, 1)
	require.ErrorContains(t, removed[0].Err, "damaged")
	require.NoError(t, s.Append([]Row{line(yesterday, "p", "again")}))
	require.Len(t, all(t, s, "*"), 2)
}
