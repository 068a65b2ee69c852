#!/usr/bin/env bash
# Builds the image of the load's two ends, registry.polymesh.dev/test/load:1, into .build/bench/load.tar: the end-to-end
# tests' echo, with vegeta and a body of 1 KB beside it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/.." && pwd)
out=$top/.build/bench
image=registry.polymesh.dev/test/load:1

((EUID == 0)) || { echo "images.sh: building images needs root: run it with sudo." >&2; exit 1; }
mkdir -p "$out"
exec 9>"$out/lock"
flock 9 # two runs would write the same storage

buildah() {
    # Without skip_mount_home a mount stays behind, and `make clean` could not remove it.
    command buildah --root "$out/storage" --runroot "$out/run" \
        --storage-driver overlay --storage-opt overlay.skip_mount_home=true "$@"
}

CGO_ENABLED=0 go -C "$top/build/upstream/vegeta" build -trimpath -ldflags "-s -w" -o "$out/vegeta" github.com/tsenart/vegeta/v12
cd "$top"
CGO_ENABLED=0 go build -tags "netgo osusergo sqlite_omit_load_extension" -trimpath -o "$out/echo" ./test/e2e/images/echo
printf '%01024d' 0 >"$out/body"

print=$(sha256sum "$here/images.sh" "$out/echo" "$out/vegeta" "$out/body" | sha256sum)
[[ -f $out/load.tar && -f $out/load.stamp && $(<"$out/load.stamp") == "$print" ]] && exit 0
container=$(buildah from scratch)
buildah copy --quiet "$container" "$out/echo" "$out/vegeta" "$out/body" / >/dev/null
buildah config --entrypoint '["/echo"]' --cmd serve --user 65532:65532 "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
rm -f "$out/load.tar.new"
buildah push --quiet "$image" "oci-archive:$out/load.tar.new:$image"
mv "$out/load.tar.new" "$out/load.tar"
echo "$print" >"$out/load.stamp"
