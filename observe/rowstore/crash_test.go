package rowstore

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// writeForever is the child: a row every 5 ms, its number on standard output when it was accepted.
func writeForever(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		at := time.Now()
		if err := s.Append([]Row{line(at, fmt.Sprint("p", i%3), strconv.Itoa(i))}); err != nil {
			return err
		}
		if _, err := fmt.Println(i, at.UnixNano()); err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond) // the rate of a log, not a wait for something
	}
}

func TestKilledLosesFiveSeconds(t *testing.T) {
	if testing.Short() {
		t.Skip("runs for 15 seconds")
	}
	dir := t.TempDir()
	for round := range 2 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+dir)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, child.Start())
		var (
			times       []time.Time
			first, last time.Time
		)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var i int
			var nanos int64
			_, err := fmt.Sscan(lines.Text(), &i, &nanos)
			require.NoError(t, err)
			at := time.Unix(0, nanos)
			// A machine that stood still for a while has not written meanwhile: count from there.
			if first.IsZero() || at.Sub(last) > 300*time.Millisecond {
				first = at
			}
			last = at
			times = append(times, at)
			if last.Sub(first) > 8*time.Second {
				break
			}
		}
		require.NoError(t, child.Process.Kill())
		killed := last
		for lines.Scan() {
		}
		require.Error(t, child.Wait())

		s, err := Open(Options{Dir: dir})
		require.NoError(t, err, "it opens again")
		stored := map[string]int{}
		require.NoError(t, s.Query(context.Background(), "*", times[0], time.Time{}, func(r Row) bool {
			stored[r.Fields[0].Value]++
			require.NotEmpty(t, r.Stream, "the stream's name is there too")
			return true
		}))
		lost := time.Duration(0)
		for i, at := range times {
			if stored[strconv.Itoa(i)] == 0 {
				lost = max(lost, killed.Sub(at))
			}
		}
		t.Logf("round %d: %d rows, the oldest lost one was %s old", round, len(times), lost)
		require.LessOrEqual(t, lost, 5*time.Second)
		require.Greater(t, lost, time.Duration(0), "else the test kills nothing")
		require.NoError(t, s.Close())
	}
}
