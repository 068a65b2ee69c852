#!/usr/bin/env bash
# usage: build.sh debian|go|java|jre|node|python|rust...
#
# Makes the images that services in these languages start from, of Debian 12's packages and of this machine's toolchains
# of Go, Node.js and Rust, in buildah's own storage and under the names that Dockerfiles ask for. No registry is needed, only
# Debian's archive or a mirror of it. Prints the name of each image that it made, and nothing for one that is there already.
# An image of such a name that came from elsewhere is left alone. debian makes only the one that most others start from.
#
# `polymesh image bases` carries and runs this script; examples/polyglot/images.sh runs it too.
#
# From the environment: DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR (default: where apt gets Debian 12), http_proxy and the
# like, CONTAINERS_STORAGE_CONF (buildah's storage), and FORCE=1, which makes all of them again, with Debian's updates.
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
label=dev.polymesh.base # what an image was made of
debian=docker.io/library/debian:bookworm-slim

fail() {
    echo "$*" >&2
    exit 1
}

# apt_site SUITE: where this machine's apt gets a suite from.
apt_site() {
    command -v apt-get >/dev/null || return 0
    apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' | awk -v suite="$1" '$2 == suite && !seen {print $1; seen = 1}'
}

# made_of IMAGE: its label; fails where there is no such image.
made_of() {
    buildah inspect --type image --format "{{index .OCIv1.Config.Labels \"$label\"}}" "$1" 2>/dev/null
}

# fresh IMAGE PRINT: nothing is to be done for IMAGE.
fresh() {
    local is
    is=$(made_of "$1") || return 1
    [[ -n $is && $is != "<no value>" ]] || return 0 # not ours
    [[ -z ${FORCE:-} && $is == "$2" ]]
}

# build IMAGE PRINT CONTEXT-DIRECTORY [OPTION...]: one Containerfile, without pulling anything.
build() {
    local image=$1 print=$2 context=$3
    shift 3
    buildah build --quiet --isolation chroot --network host --pull-never --layers --format oci \
        "$@" --label "$label=$print" --tag "$image" "$context" >/dev/null
    echo "$image"
}

# make_debian makes Debian 12's essential packages and apt, and sets debian_print.
make_debian() {
    debian_print=$(declare -f make_debian | cat - <(echo "$mirror $security_mirror") | sha256sum | cut -d' ' -f1)
    fresh "$debian" "$debian_print" && return
    mkdir "$scratch/debian"
    mmdebstrap --quiet --variant=minbase --architectures=amd64 \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        bookworm "$scratch/debian/rootfs.tar" \
        "deb $mirror bookworm main" "deb $mirror bookworm-updates main" "deb $security_mirror bookworm-security main"
    printf '%s\n' 'FROM scratch' 'ADD rootfs.tar /' 'CMD ["bash"]' >"$scratch/debian/Containerfile"
    build "$debian" "$debian_print" "$scratch/debian"
    rm -r "$scratch/debian"
}

# make NAME IMAGE EXTRA [OPTION...]: the image of the folder NAME; EXTRA is what else it is made of.
make() {
    local name=$1 image=$2 extra=$3 print
    shift 3
    print=$({ echo "$(made_of "$debian") $extra" && find "$here/$name" -type f -print0 | sort -z | xargs -0 cat; } | sha256sum | cut -d' ' -f1)
    fresh "$image" "$print" || build "$image" "$print" "$here/$name" "$@"
}

# toolchain PROGRAM WANTED IS ADVICE: the machine's toolchain has the release that an image's name promises.
toolchain() {
    [[ -n $3 ]] || fail "$1 is missing, and the image takes it from this machine: $4"
    [[ $3 == "$2"* ]] || fail "the image is to have $2, and this machine has $3: $4"
}

# version_of PROGRAM ARGUMENT...: what it prints, nothing where it is missing.
version_of() {
    command -v "$1" >/dev/null && "$@" || true
}

make_static() {
    make static gcr.io/distroless/static-debian12:latest ""
}

make_go() {
    local version
    version=$(version_of go env GOVERSION)
    toolchain go go1.26 "$version" "install Go 1.26 from https://go.dev/dl/"
    make golang docker.io/library/golang:1.26-bookworm "$version" --build-context "goroot=$(go env GOROOT)"
    make_static
}

make_java() {
    make maven docker.io/library/maven:3.8-openjdk-17-slim ""
}

make_jre() {
    make jre docker.io/library/eclipse-temurin:17-jre ""
}

make_node() {
    local version nodebin
    version=$(version_of node --version)
    toolchain node v20 "$version" "install Node.js 20 from https://nodejs.org/en/download"
    command -v npm >/dev/null || fail "npm is missing, and the image takes it from this machine: install Node.js 20 from https://nodejs.org/en/download"
    nodebin=$(dirname "$(node -p process.execPath)")
    make node docker.io/library/node:20-slim "$version $(npm --version)" \
        --build-context "nodebin=$nodebin" --build-context "npm=$(npm root --global)/npm"
    make_static
    make nodejs gcr.io/distroless/nodejs20-debian12:latest "$version $(made_of gcr.io/distroless/static-debian12:latest)" --build-context "nodebin=$nodebin"
}

make_python() {
    make python docker.io/library/python:3.11-slim ""
}

make_rust() {
    local version
    version=$(version_of rustc --version)
    toolchain rustc "rustc 1.95" "$version" "rustup default 1.95"
    make rust docker.io/library/rust:1.95-slim "$version" --build-context "rustroot=$(rustc --print sysroot)"
    make_static
}

(($#)) || fail "usage: build.sh debian|go|java|jre|node|python|rust..."
for name in "$@"; do
    [[ $name =~ ^(debian|go|java|jre|node|python|rust)$ ]] || fail "there are no base images for $name, only for debian, go, java, jre, node, python and rust"
done
missing=()
for program in buildah mmdebstrap; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((!${#missing[@]})) || fail "${missing[*]} is missing. On Debian and Ubuntu: apt-get install ${missing[*]}"
mirror=${DEBIAN_MIRROR:-$(apt_site bookworm)}
security_mirror=${DEBIAN_SECURITY_MIRROR:-$(apt_site bookworm-security)}
[[ -n $mirror && -n $security_mirror ]] ||
    fail "apt knows no mirror of Debian 12 (bookworm) and its security updates: name them in DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

make_debian
for name in "$@"; do
    "make_$name"
done
