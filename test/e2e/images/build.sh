#!/usr/bin/env bash
# Builds images of the end-to-end tests, as archives in .build/e2e that `polymesh ctr images import` takes:
#   build.sh [echo]   registry.polymesh.dev/test/echo:1, the tests' workload
#   build.sh jaeger   registry.polymesh.dev/test/jaeger, where a mesh sends its traces; jaeger/go.mod says which version
# What has not changed is not built again.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
out=$top/.build/e2e

# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"

# pack NAME TAG [OPTION...]: an image with nothing but the program $out/NAME, with these options of `buildah config`.
pack() {
    local name=$1 image=registry.polymesh.dev/test/$1:$2 print container
    shift 2
    print=$(sha256sum "$here/build.sh" "$out/$name" | sha256sum)
    [[ -f $out/$name.tar && -f $out/$name.stamp && $(<"$out/$name.stamp") == "$print" ]] && return
    echo "$image"
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$out/$name" "/$name" >/dev/null
    buildah config --entrypoint "[\"/$name\"]" --user 65532:65532 "$@" "$container"
    buildah commit --quiet --rm "$container" "$image" >/dev/null
    archive "$image" "$name"
    echo "$print" >"$out/$name.stamp"
}

export CGO_ENABLED=0
case ${1:-echo} in
echo)
    go -C "$top" build -tags "netgo osusergo sqlite_omit_load_extension disable_pgv" -trimpath -o "$out/echo" ./test/e2e/images/echo
    pack echo 1 --cmd serve
    ;;
jaeger)
    module=github.com/jaegertracing/jaeger
    version=$(go -C "$here/jaeger" list -m -f '{{.Version}}' $module)
    # Jaeger's archive in the module proxy has no web pages; its API has all that a test asks.
    go -C "$here/jaeger" build -tags "netgo osusergo" -trimpath -ldflags "-s -w" -o "$out/jaeger" $module/cmd/all-in-one
    pack jaeger "${version#v}" --cmd --collector.zipkin.host-port=:9411
    ;;
*)
    echo "build.sh: there is no image $1: say echo or jaeger." >&2
    exit 1
    ;;
esac
