package metrics

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"
)

// childDir makes this program the store that is killed, in this folder.
const childDir = "OBSERVE_TEST_METRICS_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// hours of samples, of which all but the last two or three become blocks.
const (
	hours = 9
	step  = 15 * time.Second
)

// child writes the hours, and then says the number of each further sample that it has written, until it is killed.
func child(dir string) error {
	m, err := Open(context.Background(), Options{Dir: dir, Retention: 24 * time.Hour, MaxBytes: 1 << 30, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	now := time.Now()
	n := 0
	add := func(at time.Time) error {
		app := m.Appendable().AppenderV2(context.Background())
		for i := range 10 {
			if _, err := app.Append(0, labels.FromStrings("__name__", "written", "i", fmt.Sprint(i)), 0, at.UnixMilli(), float64(n), nil, nil, storage.AOptions{}); err != nil {
				return err
			}
		}
		n++
		return app.Commit()
	}
	for at := now.Add(-hours * time.Hour); at.Before(now); at = at.Add(step) {
		if err := add(at); err != nil {
			return err
		}
	}
	for len(m.db.Blocks()) < 3 {
		time.Sleep(10 * time.Millisecond) // compaction runs in the background
	}
	for ms := 1; ; ms++ {
		if err := add(now.Add(time.Duration(ms) * time.Millisecond)); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// killed runs a child until it has said some numbers, kills it, and returns the last one.
func killed(t *testing.T, dir string) (written int) {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	c := exec.CommandContext(t.Context(), exe)
	c.Env = append(os.Environ(), childDir+"="+dir)
	c.Stderr = t.Output()
	out, err := c.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	lines := bufio.NewScanner(out)
	for range 200 {
		require.True(t, lines.Scan(), "the store has ended")
	}
	require.NoError(t, c.Process.Kill())
	last := lines.Text()
	for lines.Scan() { // what was said before it died; the last line may be half of one, which is a smaller number
		last = lines.Text()
	}
	_ = c.Wait()
	_, err = fmt.Sscan(last, &written)
	require.NoError(t, err)
	return written
}

// tree is what is in a folder.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		files[path] = fmt.Sprintf("%x %s", sha256.Sum256(content), info.ModTime())
		return err
	}))
	return files
}

// The store may write its further samples faster than a millisecond each, so some are from the next second.
const all = "sum(count_over_time(written[12h] offset -1m))"

// A store that is killed loses nothing that was committed, and no block. Its files are read without it, and are not changed by that.
func TestKill(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "metrics")
	require.NoError(t, os.MkdirAll(dir, 0o700))
	written := killed(t, dir)
	t.Logf("%d samples of each series were written", written)
	before := tree(t, dir)

	tmp := t.TempDir()
	m, err := OpenReadOnly(t.Context(), dir, tmp, slog.New(slog.NewTextHandler(t.Output(), nil)))
	require.NoError(t, err)
	r := serve(t, m)
	got := r.count(all)
	require.GreaterOrEqual(t, got, 10*written)
	require.Len(t, r.query("written"), 10)
	stat, err := r.api.TSDB(t.Context())
	require.NoError(t, err)
	require.Positive(t, stat.HeadStats.NumSeries)
	for _, path := range []string{"/-/ready", "/api/v1/targets", "/api/v1/rules", "/api/v1/alerts", "/api/v1/alertmanagers", "/api/v1/scrape_pools", "/api/v1/status/config", "/api/v1/status/tsdb/blocks", "/metrics"} {
		code, body := r.get(path)
		require.Equal(t, 200, code, "%s: %s", path, body)
	}
	require.NoError(t, m.Close())
	require.NoError(t, m.Close())
	require.Equal(t, before, tree(t, dir))
	left, err := os.ReadDir(tmp)
	require.NoError(t, err)
	require.Empty(t, left)

	s := open(t, Options{Dir: dir})
	require.Equal(t, got, s.count(all))
	blocks := len(s.db.Blocks())
	require.GreaterOrEqual(t, blocks, 3)

	// While a store runs, its files are read too.
	m, err = OpenReadOnly(t.Context(), dir, tmp, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.Equal(t, got, serve(t, m).count(all))
	require.NoError(t, m.Close())
	require.NoError(t, s.Close())

	require.Contains(t, promtool(t, "tsdb", "list", dir), "NUM SAMPLES")
	require.Contains(t, promtool(t, "tsdb", "analyze", dir), "Total Series: 10")
}

// count is the value of a query with one result.
func (s *store) count(expr string) (n int) {
	s.t.Helper()
	got := s.query(expr)
	require.Len(s.t, got, 1)
	_, err := fmt.Sscan(got[0][strings.LastIndex(got[0], " ")+1:], &n)
	require.NoError(s.t, err)
	return n
}

func TestOpenReadOnlyFails(t *testing.T) {
	_, err := OpenReadOnly(t.Context(), filepath.Join(t.TempDir(), "none"), t.TempDir(), slog.New(slog.DiscardHandler))
	require.ErrorIs(t, err, fs.ErrNotExist)

	// A damaged block is left out, an empty folder is an empty store.
	dir := t.TempDir()
	block := filepath.Join(dir, "01ARZ3NDEKTSV4RRFFQ69G5FAV")
	require.NoError(t, os.Mkdir(block, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(block, "meta.json"), []byte("{"), 0o600))
	m, err := OpenReadOnly(t.Context(), dir, t.TempDir(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.Empty(t, serve(t, m).query("up"))
	require.NoError(t, m.Close())
}
