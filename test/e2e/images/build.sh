#!/usr/bin/env bash
# Builds the image of the end-to-end tests' workload, registry.polymesh.dev/test/echo:1, into .build/e2e/echo.tar.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
out=$top/.build/e2e
image=registry.polymesh.dev/test/echo:1

((EUID == 0)) || { echo "build.sh: building images needs root: run it with sudo." >&2; exit 1; }
mkdir -p "$out"
exec 9>"$out/lock"
flock 9 # two runs would write the same storage

buildah() {
    # Without skip_mount_home a mount stays behind, and `make clean` could not remove it.
    command buildah --root "$out/storage" --runroot "$out/run" \
        --storage-driver overlay --storage-opt overlay.skip_mount_home=true "$@"
}

cd "$top"
CGO_ENABLED=0 go build -tags "netgo osusergo sqlite_omit_load_extension" -trimpath -o "$out/echo" ./test/e2e/images/echo
print=$(sha256sum "$here/build.sh" "$out/echo" | sha256sum)
[[ -f $out/echo.tar && -f $out/echo.stamp && $(<"$out/echo.stamp") == "$print" ]] && exit 0
echo "$image"
container=$(buildah from scratch)
buildah copy --quiet "$container" "$out/echo" /echo >/dev/null
buildah config --entrypoint '["/echo"]' --cmd serve --user 65532:65532 "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
rm -f "$out/echo.tar.new"
buildah push --quiet "$image" "oci-archive:$out/echo.tar.new:$image"
mv "$out/echo.tar.new" "$out/echo.tar"
echo "$print" >"$out/echo.stamp"
