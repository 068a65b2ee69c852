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
# are made of Debian packages first (bases/) and exist only in buildah's own storage, .build/polyglot/storage. What has
# not changed is not built again; FORCE=1 builds everything, which also takes in Debian's updates.
#
# From the environment: DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR (default: where apt gets Debian 12), http_proxy and its
# kin, and for pip PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, PIP_DEFAULT_TIMEOUT and this machine's
# /etc/pip.conf. Nothing of that stays in an image.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
out=$top/.build/polyglot
versions=(1.0.0 1.0.1)
go_release=1.26 # of the golang image in services/go-service/Dockerfile
rust_release=1.95
node_release=20
ca_bundle=/etc/ssl/certs/ca-certificates.crt

# apt_site SUITE: where this machine's apt gets a suite from.
apt_site() {
    apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' | awk -v suite="$1" '$2 == suite && !seen {print $1; seen = 1}'
}

mirror=${DEBIAN_MIRROR:-$(apt_site bookworm)}
security_mirror=${DEBIAN_SECURITY_MIRROR:-$(apt_site bookworm-security)}

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

# make_debian makes debian:bookworm-slim, Debian 12's essential packages and apt, and sets debian_print.
make_debian() {
    local image=docker.io/library/debian:bookworm-slim rootfs=$out/debian
    debian_print=$(declare -f make_debian build | cat - <(echo "$mirror $security_mirror") | sha256sum | cut -d' ' -f1)
    fresh debian "$debian_print" && has_image "$image" && return
    echo "debian:bookworm-slim from $mirror"
    rm -rf "$rootfs" && mkdir -p "$rootfs"
    mmdebstrap --quiet --variant=minbase --architectures=amd64 \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        bookworm "$rootfs/rootfs.tar" \
        "deb $mirror bookworm main" "deb $mirror bookworm-updates main" "deb $security_mirror bookworm-security main"
    printf '%s\n' 'FROM scratch' 'ADD rootfs.tar /' 'CMD ["bash"]' >"$rootfs/Containerfile"
    build "$image" "$rootfs"
    rm -rf "$rootfs"
    echo "$debian_print" >"$out/debian.stamp"
}

# make_base NAME IMAGE EXTRA [OPTION...]: an image of bases/NAME, under the name that a Dockerfile asks for; EXTRA is
# what else it is made of.
make_base() {
    local name=$1 image=$2 extra=$3 print
    shift 3
    print=$(fingerprint "$here/bases/$name" <<<"$debian_print $extra")
    fresh "$name" "$print" && has_image "$image" && return
    echo "$image"
    build "$image" "$here/bases/$name" "$@"
    echo "$print" >"$out/$name.stamp"
}

# make_service NAME BASE... [-- OPTION...]: the archives of services/NAME, built on the images BASE.
make_service() {
    local name=$1 bases=() authorities=() version print archive image
    shift
    while (($#)) && [[ $1 != -- ]]; do
        bases+=("$out/$1.stamp")
        shift
    done
    (($#)) && shift
    # Downloads trust whom this machine trusts.
    [[ ! -f $ca_bundle ]] || authorities=(--volume "$ca_bundle:$ca_bundle:ro")
    print=$(fingerprint "$here/services/$name" "${bases[@]}" <<<"")
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
    while (($#)); do
        bases+=("$out/$1.stamp")
        shift
    done
    [[ ! -f $ca_bundle ]] || authorities=(--volume "$ca_bundle:$ca_bundle:ro")
    # What a service's own tools leave beside its sources is no part of it.
    print=$(find "$here/services/$name" \( -name node_modules -o -name target \) -prune -o -type f -print0 | sort -z |
        xargs -0 sha256sum | fingerprint "${bases[@]}")
    fresh "$name" "$print" && has_image "$image" && return
    echo "$image"
    build "$image" "$here/services/$name" "${authorities[@]}"
    echo "$print" >"$out/$name.stamp"
}

# make_other_bases makes what services start from whose languages the guide has no code for.
make_other_bases() {
    local rust node nodebin program
    for program in rustc node npm; do
        command -v "$program" >/dev/null || fail "$program is missing: images.sh $1 takes the toolchains of Rust and Node.js from this machine."
    done
    rust=$(rustc --version)
    node=$(node --version)
    [[ $rust == "rustc $rust_release."* ]] ||
        fail "services/rust-service/Dockerfile asks for Rust $rust_release, this machine has $rust: change the Dockerfile's FROM line and rust_release here."
    [[ $node == "v$node_release."* ]] ||
        fail "services/node-service/Dockerfile asks for Node.js $node_release, this machine has $node: change the Dockerfile's FROM lines and node_release here."
    make_base rust docker.io/library/rust:$rust_release-slim "$rust" --build-context "rustroot=$(rustc --print sysroot)"
    nodebin=$(dirname "$(node -p process.execPath)")
    make_base node docker.io/library/node:$node_release-slim "$node $(npm --version)" \
        --build-context "nodebin=$nodebin" --build-context "npm=$(npm root --global)/npm"
    make_base nodejs gcr.io/distroless/nodejs$node_release-debian12:latest "$node $(<"$out/static.stamp")" --build-context "nodebin=$nodebin"
    make_base maven docker.io/library/maven:3.8-openjdk-17-slim ""
}

make_other_services() {
    keep_service rust-service rust static
    keep_service node-service node nodejs
    keep_service java-service maven debian
}

[[ ${1:-} =~ ^(|all|bases|jre)$ ]] || fail "say nothing, all, bases or jre, not $1."
# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"
for program in buildah mmdebstrap go; do
    command -v "$program" >/dev/null || fail "$program is missing. On Debian: apt-get install buildah mmdebstrap; Go from https://go.dev/dl/"
done
[[ -n $mirror && -n $security_mirror ]] || fail "apt knows no mirror of Debian 12 (bookworm) and its security updates: name them in DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR."
cd "$top" # the toolchain that the repository's go.mod names
go_version=$(go env GOVERSION)
[[ $go_version == "go$go_release"* ]] ||
    fail "services/go-service/Dockerfile asks for Go $go_release, this machine has $go_version: change the Dockerfile's FROM line and go_release here."
write_storage_conf

[[ -z ${FORCE:-} ]] || buildah rmi --all --force >/dev/null
make_debian
if [[ ${1:-} == jre ]]; then
    make_base jre docker.io/library/eclipse-temurin:17-jre ""
    exit
fi
make_base python docker.io/library/python:3.11-slim ""
make_base golang docker.io/library/golang:$go_release-bookworm "$go_version" --build-context "goroot=$(go env GOROOT)"
make_base static gcr.io/distroless/static-debian12:latest ""
[[ ${1:-} == "" ]] || make_other_bases "$1"
[[ ${1:-} != bases ]] || exit 0
trap 'rm -f "$out/pip.conf"' EXIT
mapfile -t pip_options < <(pip_settings)
make_service fastapi-service python -- "${pip_options[@]}"
make_service go-service golang static
[[ ${1:-} != all ]] || make_other_services
