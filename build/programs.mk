# What the build needs of the machine, and our own programs: polymesh, its launcher, Istio's two, the forwarder.

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

# As in Istio's own build of pilot-agent: without istiod's resource types, and so that the linker can drop more. Memory
# of every sidecar.
AGENT_TAGS := agent grpcnotrace retrynotrace

# What the Kubernetes and Istio code in our programs reports. Without it istioctl refuses the API server as too old.
# $(call kubernetes_version,<package>,<version of Kubernetes>)
kubernetes_version = \
	-X $(1).gitVersion=$(2)$(KUBERNETES_SUFFIX) \
	-X $(1).gitMajor=$(word 1,$(subst ., ,$(2:v%=%))) \
	-X $(1).gitMinor=$(word 2,$(subst ., ,$(2:v%=%))) \
	-X $(1).gitCommit=k8s.io/kubernetes@$(2) \
	-X $(1).gitTreeState=clean \
	-X $(1).buildDate=$(BUILD_DATE)
# $(call stamps,<version of Polymesh>,<version of Kubernetes>)
stamps = -X polymesh.dev/polymesh/pkg/version.Version=$(1) \
	$(call kubernetes_version,k8s.io/component-base/version,$(2)) \
	$(call kubernetes_version,k8s.io/client-go/pkg/version,$(2)) \
	-X istio.io/istio/pkg/version.buildVersion=$(ISTIO_TAG) \
	-X istio.io/istio/pkg/version.buildTag=$(ISTIO_TAG) \
	-X istio.io/istio/pkg/version.buildHub=$(ISTIO_HUB) \
	-X istio.io/istio/pkg/version.buildGitRevision=$(ISTIO_COMMIT) \
	-X istio.io/istio/pkg/version.buildStatus=Clean
STAMPS := $(call stamps,$(VERSION),$(KUBERNETES_VERSION))

# $(call go_build,<package>,<flags of the linker>,<further tags>,<stamps other than STAMPS>)
go_build = go build -tags "$(TAGS) $(3)" -ldflags "-s -w $(or $(4),$(STAMPS)) $(2)" -o $@ $(1) && touch $@

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

.build/made/pilot-discovery .build/made/pilot-agent .build/made/forward: .build/made/%: $(OURS)
	$(STEP) "$*" bash -c 'CGO_ENABLED=0 $(call go_build,./cmd/$*,,$(if $(filter pilot-agent,$*),$(AGENT_TAGS)))'

.build/bin/polymesh: .build/made/polymesh
.build/launcher: .build/made/launcher
.build/images/bin/pilot-discovery: .build/made/pilot-discovery
.build/images/bin/pilot-agent: .build/made/pilot-agent
.build/images/bin/forward: .build/made/forward
.build/bin/polymesh .build/launcher .build/images/bin/pilot-discovery .build/images/bin/pilot-agent .build/images/bin/forward:
	@mkdir -p $(@D) && { cmp -s $< $@ || cp $< $@; }
