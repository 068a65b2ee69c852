# shellcheck shell=bash
# For scripts that build images, to be sourced: $out, a folder, becomes a separate buildah storage, and is locked until
# the script ends.

((EUID == 0)) || { echo "${0##*/}: building images needs root: run it with sudo." >&2; exit 1; }
mkdir -p "$out"
exec 9>"$out/lock"
flock 9 # two runs would write the same storage

buildah() {
    # Without skip_mount_home a mount would be left behind, and `make clean` could not remove it.
    command buildah --root "$out/storage" --runroot "$out/run" \
        --storage-driver overlay --storage-opt overlay.skip_mount_home=true "$@"
}

# archive IMAGE NAME: writes an image to $out/NAME.tar, completely or not at all.
archive() {
    rm -f "$out/$2.tar.new"
    buildah push --quiet "$1" "oci-archive:$out/$2.tar.new:$1"
    mv "$out/$2.tar.new" "$out/$2.tar"
}
