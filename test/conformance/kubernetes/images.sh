#!/usr/bin/env bash
# Builds the images of Kubernetes' conformance suite, each under the names that the suite asks for, into
# .build/conformance/kubernetes/archives. The programs in them are in .build/test/kubernetes; `make conformance-kubernetes`
# makes these first.
set -euo pipefail
umask 022 # files in images are for other users

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
out=$top/.build/conformance/kubernetes
programs=$top/.build/test/kubernetes
base=docker.io/library/debian:bookworm-slim

# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"

# storage_conf is buildah's storage, for the script that makes the base image.
cat >"$out/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$out/storage"
runroot = "$out/run"
[storage.options.overlay]
skip_mount_home = "true"
END
CONTAINERS_STORAGE_CONF=$out/storage.conf "$top/pkg/workflow/baseimage/build.sh" debian

upstream=$(go -C "$top/build/upstream/kubernetes-e2e" list -m -f '{{.Dir}}' k8s.io/kubernetes)/test/images
context=$out/context
rm -rf "$context" && mkdir "$context"
cp "$here/Containerfile" "$programs"/{agnhost,nonewprivs,etcd,sample-apiserver} "$upstream"/agnhost/porter/localhost.{crt,key} "$context"
cp -r "$upstream/kitten/html" "$context/kitten"
cp -r "$upstream/nautilus/html" "$context/nautilus"
chmod -R u+w "$context" # files of the module cache are read-only

mapfile -t targets < <(sed -n 's/^FROM .* AS \(.*\)$/\1/p' "$here/Containerfile" | grep -v -- -files)
# The suite's own list of names; the last part of a name says which image it is. What needs a password is another image.
mapfile -t names < <("$programs/e2e.test" --list-images | grep '^registry\.k8s\.io/' | sort)

print=$( (sha256sum "$here/images.sh"; buildah inspect --type image --format '{{.FromImageID}}' "$base"
    find "$context" -type f -print0 | sort -z | xargs -0 sha256sum; echo "${names[*]}") | sha256sum)
[[ -f $out/images.stamp && $(<"$out/images.stamp") == "$print" ]] && exit 0

rm -rf "$out/images.stamp" "$out/archives" && mkdir "$out/archives"
for target in "${targets[@]}"; do
    buildah build --quiet --isolation chroot --network host --pull-never --layers --format oci \
        --target "$target" --tag "conformance/$target" "$context" >/dev/null
    for name in "${names[@]}"; do
        [[ ${name##*/} == "$target":* ]] || continue
        echo "$name"
        buildah push --quiet "conformance/$target" "oci-archive:$out/archives/$target-${name##*:}.tar:$name"
    done
done
echo "$print" >"$out/images.stamp"
