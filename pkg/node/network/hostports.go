package network

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
)

// hostPorts are the rules for containers' hostPorts, which the portmap plugin writes when a pod starts.
type hostPorts struct {
	attachments
	// next is the pod to check next: rules are usually removed for all pods at once, so one check at a time is enough.
	next atomic.Int64
}

// Missing implements keeper.Part.
func (h *hostPorts) Missing(ctx context.Context) (string, error) {
	pods, err := h.published()
	if err != nil || len(pods) == 0 {
		return "", err
	}
	pod := pods[int(h.next.Add(1))%len(pods)]
	if h.call(ctx, "CHECK", pod) == nil {
		return "", nil
	}
	// A pod that is being removed has no rules any more, and soon no record either.
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(endingWait):
	}
	runs, err := h.runs(pod)
	if err != nil || !runs || h.call(ctx, "CHECK", pod) == nil {
		return "", err
	}
	return "the rules of hostPorts", nil
}

// endingWait is the maximum time between the first and the last plugin when a pod's network is removed.
const endingWait = time.Second

// Restore implements keeper.Part: it writes the rules of pods that lack them.
func (h *hostPorts) Restore(ctx context.Context) error {
	pods, err := h.published()
	if err != nil {
		return err
	}
	var failures []error
	for _, pod := range pods {
		if h.call(ctx, "CHECK", pod) == nil {
			continue
		}
		err := errors.Join(h.call(ctx, "DEL", pod), h.call(ctx, "ADD", pod))
		if runs, _ := h.runs(pod); !runs {
			// The pod has ended meanwhile: its rules must not send the port to the next user of its address.
			err = h.call(ctx, "DEL", pod)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("hostPorts of container %s: %w", pod.ContainerID, err))
		}
	}
	return errors.Join(failures...)
}

// call runs the portmap plugin for a pod as libcni does
// (https://www.cni.dev/docs/spec/#section-2-execution-protocol), but leaves libcni's records alone.
func (h *hostPorts) call(ctx context.Context, command string, pod attachment) error {
	for _, plugin := range pod.list.Plugins {
		if plugin.Network.Type != portmap {
			continue
		}
		conf, err := libcni.InjectConf(plugin, map[string]any{
			"name": pod.list.Name, "cniVersion": pod.list.CNIVersion, "prevResult": types.Result(pod.result),
			"runtimeConfig": map[string]any{portMappings: pod.CapabilityArgs[portMappings]},
		})
		if err != nil {
			return err
		}
		args := &invoke.Args{
			Command: command, ContainerID: pod.ContainerID, NetNS: pod.NetNS, PluginArgs: pod.CniArgs, IfName: pod.IfName, Path: h.plugins,
		}
		if command == "ADD" {
			_, err = invoke.ExecPluginWithResult(ctx, filepath.Join(h.plugins, portmap), conf.Bytes, args, nil)
			return err
		}
		return invoke.ExecPluginWithoutResult(ctx, filepath.Join(h.plugins, portmap), conf.Bytes, args, nil)
	}
	return nil
}
