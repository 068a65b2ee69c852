#!/usr/bin/env bash
# Builds the app's images into .build/polyglot/ at the top of the repository, as OCI archives that
# `polymesh ctr images import` takes:
#   fastapi-service-1.0.0.tar  go-service-1.0.0.tar   what k8s/ asks for
#   fastapi-service-1.0.1.tar  go-service-1.0.1.tar   the same code under another version, for rolling updates
#
# `images.sh all` also builds java-service, node-service and rust-service, and leaves them in buildah's storage, where
# `polymesh deploy` finds what it needs to deploy all five:
#   CONTAINERS_STORAGE_CONF=$PWD/.build/polyglot/storage.conf polymesh deploy examples/polyglot
# `images.sh bases` builds only what services in all five languages start from, for projects that `polymesh new` makes.
#
# `images.sh jre` makes eclipse-temurin:17-jre alone, for ../spring-cloud.
#
# There is no Docker engine and no registry in this: buildah builds the Dockerfiles, and the images that they start from
# are made of Debian packages first (pkg/workflow/baseimage) and exist only in buildah's own storage, .build/polyglot/storage. What
# has not changed is not built again; FORCE=1 builds everything, which also takes in Debian's updates.
#
# From the environment: what pkg/workflow/baseimage/build.sh takes, and for pip PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, PIP_DEFAULT_TIMEOUT and this machine's
# /etc/pip.conf. Nothing of that stays in an image.
set -euo pipefail
umask 022 # files in images are for other users

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
out=$top/.build/polyglot
versions=(1.0.0 1.0.1)
ca_bundle=/etc/ssl/certs/ca-certificates.crt

fail() {
    echo "images.sh: $*" >&2
    exit 1
}

# fingerprint FILE-OR-DIRECTORY... reads more lines from its standard input: the hash of all that goes into an image.
fingerprint() {
    { cat; find "$@" -type f -print0 | sort -z | xargs -0 sha256sum; } | sha256sum | cut -d' ' -f1
}

# fresh NAME FINGERPRINT: NAME was made of just this.
fresh() {
    [[ -z ${FORCE:-} && -f $out/$1.stamp && $(<"$out/$1.stamp") == "$2" ]]
}

has_image() {
    buildah inspect --type image "$1" >/dev/null 2>&1
}

# build TAG CONTEXT-DIRECTORY [OPTION...]: one Dockerfile, without pulling anything.
build() {
    local tag=$1 context=$2
    shift 2
    buildah build --quiet --isolation chroot --network host --pull-never --layers --format oci \
        "$@" --tag "$tag" "$context" >/dev/null
}

# base_prints IMAGE...: which images these are.
base_prints() {
    local image
    for image in "$@"; do
        buildah inspect --type image --format '{{.FromImageID}}' "$image"
    done
}

# make_service NAME BASE... [-- OPTION...]: the archives of services/NAME, built on the images BASE.
make_service() {
    local name=$1 bases=() authorities=() version print archive image
    shift
    while (($#)) && [[ $1 != -- ]]; do
        bases+=("$1")
        shift
    done
    (($#)) && shift
    # Downloads trust whom this machine trusts.
    [[ ! -f $ca_bundle ]] || authorities=(--volume "$ca_bundle:$ca_bundle:ro")
    print=$(base_prints "${bases[@]}" | fingerprint "$here/services/$name")
    for version in "${versions[@]}"; do
        archive=$out/$name-$version.tar
        fresh "$name-$version" "$print" && [[ -f $archive ]] && continue
        image=docker.io/my-registry/$name:$version
        echo "$image"
        build "$image" "$here/services/$name" "${authorities[@]}" --label "org.opencontainers.image.version=$version" "$@"
        archive "$image" "$name-$version"
        echo "$print" >"$out/$name-$version.stamp"
    done
}

# pip_settings writes what the environment says to pip into a file, and prints buildah's options that show it to pip
# for the time of the build. As environment of the build it would stay in the image.
pip_settings() {
    local name value
    (umask 077 && : >"$out/pip.conf") # it may hold a password
    {
        echo '[global]'
        for name in INDEX_URL EXTRA_INDEX_URL TRUSTED_HOST DEFAULT_TIMEOUT; do
            value=PIP_$name
            [[ -z ${!value:-} ]] || { tr '[:upper:]_' '[:lower:]-' <<<"$name" | tr -d '\n' && echo " = ${!value}"; }
        done
    } >"$out/pip.conf"
    printf '%s\n' --volume "$out/pip.conf:/root/.config/pip/pip.conf:ro"
    [[ ! -f /etc/pip.conf ]] || printf '%s\n' --volume /etc/pip.conf:/etc/pip.conf:ro
}

# write_storage_conf tells other programs, such as polymesh deploy's buildah, of the storage.
write_storage_conf() {
    cat >"$out/storage.conf" <<EOF
[storage]
driver = "overlay"
graphroot = "$out/storage"
runroot = "$out/run"
[storage.options.overlay]
skip_mount_home = "true"
EOF
}

# keep_service NAME BASE...: services/NAME, built on the images BASE, in the storage. `make up` imports every archive in
# .build/polyglot, and the node needs no images that it does not run.
keep_service() {
    local name=$1 bases=() authorities=() print image=docker.io/my-registry/$1:${versions[0]}
    shift
    bases=("$@")
    [[ ! -f $ca_bundle ]] || authorities=(--volume "$ca_bundle:$ca_bundle:ro")
    # What a service's own tools leave beside its sources is no part of it.
    print=$({ base_prints "${bases[@]}"; find "$here/services/$name" \( -name node_modules -o -name target \) -prune -o -type f -print0 |
        sort -z | xargs -0 sha256sum; } | sha256sum | cut -d' ' -f1)
    fresh "$name" "$print" && has_image "$image" && return
    echo "$image"
    build "$image" "$here/services/$name" "${authorities[@]}"
    echo "$print" >"$out/$name.stamp"
}

golang=docker.io/library/golang:1.26-bookworm
python=docker.io/library/python:3.11-slim
rust=docker.io/library/rust:1.95-slim
node=docker.io/library/node:20-slim
maven=docker.io/library/maven:3.8-openjdk-17-slim
debian=docker.io/library/debian:bookworm-slim
static=gcr.io/distroless/static-debian12:latest
nodejs=gcr.io/distroless/nodejs20-debian12:latest

make_other_services() {
    keep_service rust-service "$rust" "$static"
    keep_service node-service "$node" "$nodejs"
    keep_service java-service "$maven" "$debian"
}

[[ ${1:-} =~ ^(|all|bases|jre)$ ]] || fail "say nothing, all, bases or jre, not $1."
# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"
cd "$top" # the Go toolchain that the repository's go.mod names
write_storage_conf
export CONTAINERS_STORAGE_CONF=$out/storage.conf

[[ -z ${FORCE:-} ]] || buildah rmi --all --force >/dev/null
case ${1:-} in
jre) languages=(jre) ;;
all | bases) languages=(go java node python rust) ;;
*) languages=(go python) ;;
esac
"$top/pkg/workflow/baseimage/build.sh" "${languages[@]}"
[[ ${1:-} != @(bases|jre) ]] || exit 0
trap 'rm -f "$out/pip.conf"' EXIT
mapfile -t pip_options < <(pip_settings)
make_service fastapi-service "$python" -- "${pip_options[@]}"
make_service go-service "$golang" "$static"
[[ ${1:-} != all ]] || make_other_services
