package nodemetrics

import (
	"bytes"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

// TestGolden shows what becomes of the files of a machine whose /proc and /sys are in testdata.
func TestGolden(t *testing.T) {
	c, err := open("testdata/proc", "testdata/sys", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	families := gather(t, c)
	// These ask the machine on which the test runs.
	maps.DeleteFunc(families, func(name string, _ *dto.MetricFamily) bool { return live(name) })
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(families)) {
		_, err := expfmt.MetricFamilyToText(&text, families[name])
		require.NoError(t, err)
	}
	golden(t, "testdata/metrics.txt", text.Bytes())
}

// TestMounts shows which filesystems of that machine are reported.
func TestMounts(t *testing.T) {
	c, err := open("testdata/proc", "testdata/sys", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	list, err := c.mounts.current(time.Now())
	require.NoError(t, err)
	require.Equal(t, []mount{
		{"/dev/vda", "/", "ext4", false},
		{"tmpfs", "/run", "tmpfs", false},
		{"/dev/vdc", "/mnt/broken", "ext4", true},
		{"10.0.0.9:/new", "/mnt/old", "nfs4", false},
		{"10.0.0.9:/export", "/mnt/with space", "nfs4", true},
		{"/dev/nvme0n1p1", "/var/lib/polymesh", "xfs", false},
	}, list)
}

// TestManyMounts: a user who may mount cannot make more series than maxMounts, nor a label that is too long.
func TestManyMounts(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "self"), 0o755))
	var info strings.Builder
	fmt.Fprintf(&info, "1 1 9:9 / /%s rw - ext4 /dev/vdz rw\n2 1 9:8 / /a\xff rw - ext4 /dev/vdy rw\n3 1 9:7 / / rw - ext4 %s rw\n", strings.Repeat("x", 300), strings.Repeat("d", 999))
	for i := range 1000 {
		fmt.Fprintf(&info, "%d 1 8:%d / /m/%d rw - ext4 /dev/vda rw\n", i+4, i, i)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "self/mountinfo"), []byte(info.String()), 0o644))
	c, err := open(dir, dir, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	list, err := c.mounts.current(time.Now())
	require.NoError(t, err)
	require.Len(t, list, maxMounts)
	require.Equal(t, "/", list[0].point)
	for _, m := range gather(t, c)["node_filesystem_device_error"].Metric {
		for _, l := range m.Label {
			require.LessOrEqual(t, len(l.GetValue()), maxLabel)
		}
	}
}

// TestMachine collects from the machine on which the test runs: the numbers are those of the kernel, and there are not too many.
func TestMachine(t *testing.T) {
	c, err := New(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	require.NoError(t, err)
	families := gather(t, c)
	series := 0
	for _, f := range families {
		series += len(f.Metric)
	}
	t.Logf("%d series", series)
	cpus := len(families["node_cpu_seconds_total"].Metric)
	require.Less(t, series-cpus, 300)
	require.Zero(t, cpus%8)

	var info unix.Sysinfo_t
	require.NoError(t, unix.Sysinfo(&info))
	require.Equal(t, float64(info.Totalram)*float64(info.Unit), families["node_memory_MemTotal_bytes"].Metric[0].GetGauge().GetValue())
	var root unix.Statfs_t
	require.NoError(t, unix.Statfs("/", &root))
	for _, m := range families["node_filesystem_size_bytes"].Metric {
		if l := labelsOf(m); l["mountpoint"] == "/" {
			require.Equal(t, float64(root.Blocks)*float64(root.Bsize), m.GetGauge().GetValue())
		}
	}
}

// TestNodeExporter compares with what node_exporter itself makes of the files in testdata: the same names, types and labels, and the same values
// where they are not the machine's on which it ran.
func TestNodeExporter(t *testing.T) {
	file, err := os.Open("testdata/node_exporter.txt")
	require.NoError(t, err)
	defer file.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	known, err := parser.TextToMetricFamilies(file)
	require.NoError(t, err)
	c, err := open("testdata/proc", "testdata/sys", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	compared := 0
	for name, f := range gather(t, c) {
		theirs := known[name]
		require.NotNil(t, theirs, "node_exporter has no %s", name)
		require.Equal(t, theirs.GetType(), f.GetType(), name)
		require.Equal(t, slices.Sorted(maps.Keys(labelsOf(theirs.Metric[0]))), slices.Sorted(maps.Keys(labelsOf(f.Metric[0]))), name)
		if live(name) || name == "node_scrape_collector_success" {
			continue
		}
		for _, m := range f.Metric {
			i := slices.IndexFunc(theirs.Metric, func(o *dto.Metric) bool { return maps.Equal(labelsOf(o), labelsOf(m)) })
			require.NotEqual(t, -1, i, "%s %v", name, labelsOf(m))
			require.InEpsilon(t, 1+valueOf(theirs.Metric[i]), 1+valueOf(m), 1e-12, "%s %v", name, labelsOf(m))
			compared++
		}
	}
	require.Greater(t, compared, 100)
}

// live reports whether a family is about the machine on which the test runs, in spite of other files.
func live(name string) bool {
	return strings.HasPrefix(name, "node_filesystem_") || name == "node_uname_info" || name == "node_time_seconds"
}

// TestHungMount collects while a filesystem answers nothing: a FUSE filesystem without a server. It is in a mount namespace of its own,
// because other programs on the machine would hang as well.
func TestHungMount(t *testing.T) {
	const child = "POLYMESH_TEST_HUNG_MOUNT"
	if os.Getenv(child) == "" {
		if os.Getuid() != 0 {
			t.Skip("only root can mount")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestHungMount$", "-test.v")
		cmd.Env = append(os.Environ(), child+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return
	}
	dir := os.Getenv(child)
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no FUSE here: %v", err)
	}
	require.NoError(t, unix.Mount("silent", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse)))

	c, err := New(slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	state := func() (problem string, others int) {
		for _, m := range gather(t, c)["node_filesystem_device_error"].Metric {
			if l := labelsOf(m); l["mountpoint"] == dir {
				problem = l["device_error"]
			} else if m.GetGauge().GetValue() == 0 {
				others++
			}
		}
		return problem, others
	}
	problem, others := state()
	require.Equal(t, "mountpoint timeout", problem)
	require.NotZero(t, others, "the other filesystems are reported")
	started := time.Now()
	problem, _ = state()
	require.Equal(t, "mountpoint timeout", problem)
	require.Less(t, time.Since(started), statTimeout, "nobody waits for it a second time")
	require.Equal(t, map[string]bool{dir: true}, c.mounts.asked, "one goroutine waits, not one for each collection")

	// The server is gone for good: the filesystem answers with an error now.
	require.NoError(t, unix.Close(fuse))
	require.Eventually(t, func() bool {
		problem, _ := state()
		return problem == unix.ENOTCONN.Error()
	}, time.Minute, 10*time.Millisecond)
}

func gather(t *testing.T, c prometheus.Collector) map[string]*dto.MetricFamily {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(c))
	list, err := registry.Gather()
	require.NoError(t, err)
	families := map[string]*dto.MetricFamily{}
	for _, f := range list {
		families[f.GetName()] = f
	}
	return families
}

func labelsOf(m *dto.Metric) map[string]string {
	labels := map[string]string{}
	for _, l := range m.Label {
		labels[l.GetName()] = l.GetValue()
	}
	return labels
}

func valueOf(m *dto.Metric) float64 {
	return m.GetGauge().GetValue() + m.GetCounter().GetValue() + m.GetUntyped().GetValue()
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(file, got, 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), "run the test with -update if this is intended")
}

func BenchmarkCollect(b *testing.B) {
	c, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		out := make(chan prometheus.Metric, 1000)
		c.Collect(out)
	}
}
