#!/usr/bin/env bash
# Builds the image of the load's two ends, registry.polymesh.dev/test/load:1, into .build/bench/load.tar: the end-to-end
# tests' echo, with vegeta and a body of 1 KB next to it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/.." && pwd)
out=$top/.build/bench
image=registry.polymesh.dev/test/load:1

# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"

CGO_ENABLED=0 go -C "$top/build/upstream/vegeta" build -trimpath -ldflags "-s -w" -o "$out/vegeta" github.com/tsenart/vegeta/v12
cd "$top"
CGO_ENABLED=0 go build -tags "netgo osusergo sqlite_omit_load_extension disable_pgv" -trimpath -o "$out/echo" ./test/e2e/images/echo
printf '%01024d' 0 >"$out/body"

print=$(sha256sum "$here/images.sh" "$out/echo" "$out/vegeta" "$out/body" | sha256sum)
[[ -f $out/load.tar && -f $out/load.stamp && $(<"$out/load.stamp") == "$print" ]] && exit 0
container=$(buildah from scratch)
buildah copy --quiet "$container" "$out/echo" "$out/vegeta" "$out/body" / >/dev/null
buildah config --entrypoint '["/echo"]' --cmd serve --user 65532:65532 "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
archive "$image" load
echo "$print" >"$out/load.stamp"
