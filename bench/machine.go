package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/test/e2e/node"
)

// machine describes the machine of the measurements.
type machine struct {
	Date, CPU, Kernel, System, Polymesh string
	Cores                               int
	Memory                              float64 // GB
}

func describeMachine(ctx context.Context) (machine, error) {
	m := machine{Date: time.Now().UTC().Format(time.DateOnly), Cores: runtime.NumCPU(), CPU: field("/proc/cpuinfo", "model name"), System: strings.Trim(field("/etc/os-release", "PRETTY_NAME"), `"`)}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	kib, _ := strconv.ParseFloat(strings.TrimSuffix(field("/proc/meminfo", "MemTotal"), " kB"), 64)
	m.Memory = kib * 1024 / 1e9
	program, err := node.Program()
	if err != nil {
		return m, err
	}
	out, err := exec.CommandContext(ctx, program, "version").Output()
	if err != nil {
		return m, fmt.Errorf("get the version: %w", err)
	}
	var versions []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] != "image" {
			versions = append(versions, f[0]+" "+f[1])
		}
	}
	m.Polymesh = strings.Join(versions, ", ")
	return m, nil
}

// field returns the value of a line "name: value" or "name=value" in a file, or an empty string.
func field(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if at := strings.IndexAny(line, ":="); at > 0 && strings.TrimSpace(line[:at]) == name {
			return strings.TrimSpace(line[at+1:])
		}
	}
	return ""
}

func loadAverage() (float64, error) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.Fields(string(text))[0], 64)
}
