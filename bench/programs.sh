#!/usr/bin/env bash
# Builds the programs of the measurements of many nodes into .build/bench: Kubernetes' own kubemark, kubelets without containers;
# kwok, which pretends to be the kubelets of thousands of pods, with its own stages; the end-to-end tests' echo; vegeta.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$top/.build/bench
mkdir -p "$out"
export CGO_ENABLED=0

cd "$top"
tags="netgo osusergo sqlite_omit_load_extension disable_pgv"
go build -tags "$tags" -trimpath -ldflags "-s -w" -o "$out/kubemark" k8s.io/kubernetes/cmd/kubemark
go build -tags "$tags" -trimpath -o "$out/echo" ./test/e2e/images/echo
go -C build/upstream/vegeta build -trimpath -ldflags "-s -w" -o "$out/vegeta" github.com/tsenart/vegeta/v12
go -C build/upstream/kwok build -tags "netgo osusergo" -trimpath -ldflags "-s -w" -o "$out/kwok" sigs.k8s.io/kwok/cmd/kwok
printf '%01024d' 0 >"$out/body"

stages=$(go -C build/upstream/kwok list -m -f '{{.Dir}}' sigs.k8s.io/kwok)/kustomize/stage
for stage in node/fast/node-initialize node/heartbeat-with-lease/node-heartbeat-with-lease pod/fast/pod-ready pod/fast/pod-delete; do
    echo ---
    cat "$stages/$stage.yaml"
done >"$out/stages.yaml"
