package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The program in these tests is the test binary itself.
const roleVar = "POLYMESH_OBSERVE_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(roleVar) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	// Without the limits of the tests' own environment.
	inherited := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "GOMAXPROCS=") || strings.HasPrefix(v, "GOGC=") || strings.HasPrefix(v, "GOMEMLIMIT=")
	})
	cmd.Env = append(inherited, roleVar+"=1")
	return cmd
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	socket, log := filepath.Join(dir, "observe.sock"), filepath.Join(dir, "observe.log")
	args := []string{"--data-dir", filepath.Join(dir, "data"), "--socket", socket, "--log", log}
	cmd := program(args...)
	require.NoError(t, cmd.Start())
	defer cmd.Process.Kill() //nolint:errcheck // it has ended if the test passes
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
			break
		}
		require.True(t, time.Now().Before(end), "it does not listen: %v", err)
	}
	second := program("--data-dir", filepath.Join(dir, "data"), "--socket", filepath.Join(dir, "other.sock"))
	text, err := second.CombinedOutput()
	require.Error(t, err)
	require.Regexp(t, `^polymesh-observe: .*/data is used by process \d+, which serves on .*/observe\.sock\n$`, string(text))

	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait())
	require.NoFileExists(t, socket)
	lines, err := os.ReadFile(log)
	require.NoError(t, err)
	require.Contains(t, string(lines), "msg=stopped")
	info, err := os.Stat(log)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}

func TestWithoutStore(t *testing.T) {
	text, err := program("--version").CombinedOutput()
	require.NoError(t, err)
	require.Equal(t, "dev\n", string(text))
	text, err = program("--help").CombinedOutput()
	require.NoError(t, err)
	require.Contains(t, string(text), "--data-dir")
	text, err = program("--disk=x").CombinedOutput()
	require.Error(t, err)
	require.Equal(t, 1, strings.Count(string(text), "\n"), string(text))
}

// The runtime's limits hold before anything else runs, and those of the environment come first.
func TestRuntimeIsLimited(t *testing.T) {
	procs := min(2, runtime.NumCPU())
	for name, tc := range map[string]struct {
		set   []string
		args  []string
		procs int
		heap  int64
	}{
		"nothing is set":     {nil, nil, procs, 115_384_615},
		"a larger memory":    {nil, []string{"--memory=300MB"}, procs, 230_769_230},
		"by the environment": {[]string{"GOMAXPROCS=1", "GOMEMLIMIT=123456789"}, []string{"--memory=300MB"}, 1, 123_456_789},
	} {
		t.Run(name, func(t *testing.T) {
			temp := t.TempDir()
			socket := filepath.Join(temp, "observe.sock")
			cmd := program(append(tc.args, "--data-dir", filepath.Join(temp, "data"), "--log", filepath.Join(temp, "log"), "--socket", socket)...)
			cmd.Env = append(cmd.Env, tc.set...)
			c := startProgram(t, socket, cmd)
			var answer struct {
				Data struct {
					GOMAXPROCS int
					GOMEMLIMIT int64
					GOGC       string
				}
			}
			until(t, "the metrics answer", func() bool {
				code, text := c.do(http.MethodGet, "/api/v1/status/runtimeinfo", "", nil)
				return code == http.StatusOK && json.Unmarshal([]byte(text), &answer) == nil
			})
			require.Equal(t, tc.procs, answer.Data.GOMAXPROCS)
			require.Equal(t, tc.heap, answer.Data.GOMEMLIMIT)
			require.Equal(t, "50", answer.Data.GOGC)
			environment, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.cmd.Process.Pid))
			require.NoError(t, err)
			require.Contains(t, string(environment), fmt.Sprintf("GOMAXPROCS=%d\x00", tc.procs), "from the beginning")
		})
	}
}

// The log starts again when it is large, and what is not written by it counts too.
func TestLogIsRotated(t *testing.T) {
	before, err := syscall.Dup(2)
	require.NoError(t, err)
	defer func() {
		_ = syscall.Dup3(before, 2, 0)
		syscall.Close(before)
	}()
	path := filepath.Join(t.TempDir(), "log")
	r, err := openLog(path)
	require.NoError(t, err)
	_, err = syscall.Write(2, bytes.Repeat([]byte("x"), maxLog-10))
	require.NoError(t, err)
	_, err = r.Write([]byte("0123456789"))
	require.NoError(t, err)
	require.NoFileExists(t, path+".1")
	_, err = r.Write([]byte("new\n"))
	require.NoError(t, err)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "new\n", string(text))
	info, err := os.Stat(path + ".1")
	require.NoError(t, err)
	require.Equal(t, int64(maxLog), info.Size())
}
