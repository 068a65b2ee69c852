# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# The app's images: built by examples/polyglot/images.sh, imported into the node's containerd.

build_images() {
    local made
    made=$("$app/images.sh")
    printf '%s\n' "$made"
    [[ -n $made ]] || return 0
    changed
    note "$(wc -l <<<"$made") built"
}

import_images() {
    local archive name digest have imported=0
    have=$(in_node "$program" ctr images ls)
    for archive in "$top"/.build/polyglot/*.tar; do
        # An archive of images.sh contains one image, and its index one name and one digest.
        name=$(tar -xOf "$archive" index.json | sed 's/.*"org.opencontainers.image.ref.name":"\([^"]*\)".*/\1/')
        digest=$(tar -xOf "$archive" index.json | sed 's/.*"digest":"\([^"]*\)".*/\1/')
        awk -v name="$name" -v digest="$digest" '$1 == name && $3 == digest {found = 1} END {exit !found}' <<<"$have" && continue
        in_node "$program" ctr images import "$archive"
        imported=$((imported + 1))
    done
    ((imported)) || return 0
    changed
    note "$imported imported"
}
