# Every pin of the build that no go.mod holds. The Makefile includes this file and shell scripts read it, so a line is
# always KEY := value. Versions of Go modules (Kubernetes, Istio, containerd, runc, CoreDNS and so on) stand in go.mod and
# build/upstream/*/go.mod, Debian packages with their checksums in build/debian/packages.lock, and Envoy with its
# checksum in build/envoy/requirements.txt.

# The release of Polymesh.
VERSION := 0.1.0

# Added to the version that the Kubernetes components report, as K3s does with +k3s1.
KUBERNETES_SUFFIX := +polymesh1

# The Kubernetes of the version before, of which the tests have a node that joins newer servers: of the minor version before that in go.mod.
OLDER_KUBERNETES_VERSION := v1.35.3

# Istio's release line; the first twelve digits of the pinned commit complete the tag.
ISTIO_RELEASE := 1.31.0

# The commit of the Kubernetes tag in go.mod is not in the module, so `kubectl version -o yaml` names the module instead.
# The time of the build is the date of that tag: a clock would make every build another file.
BUILD_DATE := 2026-07-22T18:07:38Z
SOURCE_DATE_EPOCH := 1784743658

# The version that build/pause/Makefile of the pinned Kubernetes gives to pause.c.
PAUSE_VERSION := 3.10.2

# The images carry names of this registry. Nothing is ever pulled from it: the names are looked up in the node's own store.
IMAGE_REGISTRY := registry.polymesh.dev

# Envoy's version, as Istio's proxy image reports it.
ENVOY_VERSION := 1.40.0
