#!/usr/bin/env bash
# Builds the images of the Gateway API conformance suite, under each name that the suite's manifests use, into
# .build/conformance/gatewayapi/archives. echo-basic is the suite's own program; echo-advanced is Istio's echo, as upstream.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
out=$top/.build/conformance/gatewayapi
registry=registry.k8s.io/gateway-api

# shellcheck source=build/image-storage.sh
source "$top/build/image-storage.sh"

cd "$top"
mkdir -p "$out/bin"
build() {
    CGO_ENABLED=0 go build -tags "netgo osusergo sqlite_omit_load_extension disable_pgv" -trimpath -o "$out/bin/$1" "$2"
}
build echo-basic sigs.k8s.io/gateway-api/conformance/echo-basic
build server istio.io/istio/pkg/test/echo/cmd/server
build client istio.io/istio/pkg/test/echo/cmd/client
suite=$(go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api/conformance)
istio=$(go list -m -f '{{.Dir}}' istio.io/istio)
mapfile -t names < <(grep -rhoE "$registry/echo-(basic|advanced):[A-Za-z0-9._-]+" "$suite" --include='*.yaml' | sort -u)

print=$( (sha256sum "$here/images.sh" "$out"/bin/*; echo "${names[*]}") | sha256sum)
[[ -f $out/images.stamp && $(<"$out/images.stamp") == "$print" ]] && exit 0

container=$(buildah from scratch)
buildah copy --quiet "$container" "$out/bin/echo-basic" /echo-basic >/dev/null
buildah config --entrypoint '["/echo-basic"]' --user 65532:65532 "$container"
buildah commit --quiet --rm "$container" echo-basic >/dev/null

# The suite runs `client` in the pod, by that name.
container=$(buildah from scratch)
buildah copy --quiet "$container" "$out/bin/server" "$out/bin/client" /usr/local/bin/ >/dev/null
buildah copy --quiet "$container" "$istio/tests/testdata/certs/dns/cert-chain.pem" /cert.crt >/dev/null
buildah copy --quiet "$container" "$istio/tests/testdata/certs/dns/key.pem" /cert.key >/dev/null
buildah config --entrypoint '["/usr/local/bin/server"]' --env PATH=/usr/local/bin --user 1338:1338 "$container"
buildah commit --quiet --rm "$container" echo-advanced >/dev/null

rm -rf "$out/images.stamp" "$out/archives" && mkdir "$out/archives"
for name in "${names[@]}"; do
    echo "$name"
    image=${name#"$registry/"}
    buildah push --quiet "localhost/${image%:*}" "oci-archive:$out/archives/${image/:/-}.tar:$name"
done
echo "$print" >"$out/images.stamp"
