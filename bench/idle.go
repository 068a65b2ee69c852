package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
)

// process is one of a node's processes at rest.
type process struct {
	Name           string
	PID            int
	RSS, Anonymous float64 // MB
	CPU            float64 // percent of one core
}

const (
	serverProcess     = "server"
	containerdProcess = "containerd"
	shimProcess       = "containerd-shim"
)

// rest measures an idle node.
func (b *bench) rest(ctx context.Context, n *node.Node, id setting) error {
	if err := wait(ctx, b.settle); err != nil {
		return err
	}
	found, err := processesOf(ctx, n)
	if err != nil {
		return err
	}
	before := map[int]float64{}
	begin := time.Now()
	for _, p := range found {
		before[p.PID] = cpuSeconds(p.PID)
	}
	if err := wait(ctx, b.idle); err != nil {
		return err
	}
	var all process
	for i := range found {
		p := &found[i]
		p.CPU = 100 * (cpuSeconds(p.PID) - before[p.PID]) / time.Since(begin).Seconds()
		rss, anonymous := status.Memory(p.PID)
		if rss == 0 {
			return fmt.Errorf("%s (process %d) exited during the measurement", p.Name, p.PID)
		}
		p.RSS, p.Anonymous = float64(rss)/1e6, float64(anonymous)/1e6
		all.RSS += p.RSS
		all.Anonymous += p.Anonymous
		all.CPU += p.CPU
	}
	b.results.addProcesses(id, found)
	for _, p := range found {
		if p.Name == serverProcess {
			b.results.add(figureID(string(id)+" server RSS"), p.RSS)
			b.results.add(figureID(string(id)+" server anonymous"), p.Anonymous)
			b.results.add(figureID(string(id)+" server CPU"), p.CPU)
		}
	}
	b.results.add(figureID(string(id)+" all anonymous"), all.Anonymous)
	b.results.add(figureID(string(id)+" all CPU"), all.CPU)
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// podMark matches the pod's uid in the name of its cgroup.
var podMark = regexp.MustCompile(`pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})`)

// processesOf lists a node's processes: the server, containerd, the shims, and processes in pods.
func processesOf(ctx context.Context, n *node.Node) ([]process, error) {
	report, err := n.Report(ctx)
	if err != nil {
		return nil, err
	}
	client, err := n.NewClient()
	if err != nil {
		return nil, err
	}
	pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	workloads := map[string]string{}
	for _, p := range pods.Items {
		workloads[string(p.UID)] = workload(&p)
	}
	found := []process{{Name: serverProcess, PID: report.PID}}
	for _, c := range report.Components {
		if c.PID != 0 {
			found = append(found, process{Name: c.Name, PID: c.PID})
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	cgroup := n.Layout().CgroupRoot() + "/"
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if err != nil {
			continue // a kernel thread, or just exited
		}
		if strings.HasPrefix(exe, n.DataDir()+"/") && filepath.Base(exe) == "containerd-shim-runc-v2" {
			found = append(found, process{Name: shimProcess, PID: pid})
			continue
		}
		group, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		mark := podMark.FindStringSubmatch(string(group))
		if err != nil || mark == nil || !strings.Contains(string(group), cgroup) {
			continue
		}
		name, ok := workloads[strings.ReplaceAll(mark[1], "_", "-")]
		if !ok {
			continue // its pod is being deleted
		}
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue
		}
		found = append(found, process{Name: name + ": " + strings.TrimSpace(string(comm)), PID: pid})
	}
	if len(found) < 3 {
		return nil, errors.New("the node has no pods")
	}
	return found, nil
}

// workload returns the name of a pod's owner.
func workload(p *corev1.Pod) string {
	if hash := p.Labels["pod-template-hash"]; hash != "" {
		if at := strings.LastIndex(p.Name, "-"+hash); at > 0 {
			return p.Name[:at]
		}
	}
	return p.Name
}

// cpuSeconds returns the CPU time of a process.
func cpuSeconds(pid int) float64 { return statSeconds(pid, 14) }

// endedSeconds returns the CPU time of the children of a process that have ended.
func endedSeconds(pid int) float64 { return statSeconds(pid, 16) }

// statSeconds returns the sum of a field of a process's stat file and the one after it (proc(5)): time of the process and of the kernel
// for it. The kernel uses hundredths of a second there, on every architecture that Go supports.
func statSeconds(pid, field int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The second field, in parentheses, may contain any characters.
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(f) < field-1 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[field-3], 64)
	system, _ := strconv.ParseFloat(f[field-2], 64)
	return (user + system) / 100
}
