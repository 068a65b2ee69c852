# The tests, and what is built for them alone.

# --- for the tests alone -------------------------------------------------------------------------------------------------

.build/gotestsum: build/upstream/gotestsum/go.mod build/upstream/gotestsum/go.sum | .build/packages
	$(STEP) "gotestsum" go -C build/upstream/gotestsum build -o $(CURDIR)/$@ gotest.tools/gotestsum

# Linked without symbols and without vet, which `make lint` runs: the largest test program there is.
.build/test/e2e.test: force | .build/packages
	@mkdir -p $(@D)
	$(STEP) "the end-to-end tests" go test -c -vet=off -ldflags "-s -w" -tags "$(TAGS) e2e" -o $@ ./test/e2e

.build/test/run: $(wildcard test/e2e/run/*.go test/e2e/lanes/*.go) | .build/packages
	$(STEP) "what runs them" go build -tags "$(TAGS)" -o $@ ./test/e2e/run
	@touch $@

# It compiles for some five minutes of one core: Consul knows every cloud.
.build/test/consul: build/upstream/consul/main.go $(call modules,consul)
	@mkdir -p $(@D)
	$(STEP) "Consul $(CONSUL_VERSION), for the tests" bash -c '$(call upstream,consul,.,,)'

# Upstream's evaluator of NetworkPolicies, with which the tests of pkg/node/netpol compare ours.
.build/test/kube-network-policies: build/upstream/kube-network-policies/main.go $(call modules,kube-network-policies)
	@mkdir -p $(@D)
	$(STEP) "kube-network-policies' evaluator, for the tests" bash -c '$(call upstream,kube-network-policies,.,,)'

# Its own back end, with which a test asks the store's APIs. Its pages are not in the module.
.build/test/kiali: $(call modules,kiali)
	@mkdir -p $(@D)
	$(STEP) "Kiali $(KIALI_VERSION), for the tests" bash -c '$(call upstream,kiali,github.com/kiali/kiali,-X main.version=$(KIALI_VERSION),)'

.build/test/versitygw: $(call modules,versitygw)
	@mkdir -p $(@D)
	$(STEP) "an S3 server, for the tests" bash -c '$(call upstream,versitygw,github.com/versity/versitygw/cmd/versitygw,,)'

# The version before, of which a machine joins a server of today: today's sources that report the minor version of Kubernetes before. That
# shows the protocol, and what is done about versions.
OLDER := .build/test/older
OLDER_STAMPS := $(call stamps,0.0.1,$(OLDER_KUBERNETES_VERSION))
$(OLDER)/bin/polymesh: $(OURS)
	@mkdir -p $(@D)
	$(STEP) "polymesh of the version before, for the tests" bash -c '$(call go_build,./cmd/polymesh,-extldflags -static,,$(OLDER_STAMPS))'

# Built with that Kubernetes, so that its kubelet and its kube-proxy are older as well. It compiles for three minutes of two cores. The other
# modules are those of go.mod; in test/e2e/older are what the older one needs besides, the checksums, and calls of ours that it does not have.
OLDER_MODULES := sed -E -e '/streaming/!s|(=> k8s.io/[a-z-]+) v0\.[0-9.]+|\1 $(OLDER_KUBERNETES_VERSION:v1.%=v0.%)|' -e 's|(k8s.io/kubernetes) v[0-9.]+|\1 $(OLDER_KUBERNETES_VERSION)|'
OLDER_CALLS := $(addprefix pkg/,ssa/fields.go node/netpol/netpol.go node/announce/announce.go node/imagegate.go)
$(OLDER)/bin/agent: $(OURS) $(wildcard test/e2e/older/*)
	@mkdir -p $(@D) && { $(OLDER_MODULES) go.mod && cat test/e2e/older/kubernetes.mod; } >$(OLDER)/kubernetes.mod && cat go.sum test/e2e/older/kubernetes.sum >$(OLDER)/kubernetes.sum
	@for file in $(OLDER_CALLS); do sed -f test/e2e/older/calls.sed $$file >$(OLDER)/$${file##*/}; done
	@printf '{"Replace": {%s}}' '$(subst $(space),$(comma),$(foreach file,$(OLDER_CALLS),"$(file)":"$(OLDER)/$(notdir $(file))"))' >$(OLDER)/calls.json
	$(STEP) "agent with Kubernetes $(OLDER_KUBERNETES_VERSION), for the tests" bash -c '$(call go_build,-modfile=$(OLDER)/kubernetes.mod -overlay=$(OLDER)/calls.json ./test/e2e/older,-extldflags -static,,$(OLDER_STAMPS))'

# As dist/polymesh, with that program.
$(OLDER)/polymesh $(OLDER)/agent: $(OLDER)/%: $(OLDER)/bin/% dist/polymesh
	$(STEP) "$@" bash -c '$(call pack,$<,0.0.1,3)'

# Kubernetes' end-to-end tests, which its conformance suite is a part of, the program that runs them next to each other, and
# those of their images. Ten minutes of one core.
CONFORMANCE := $(addprefix .build/test/kubernetes/,e2e.test ginkgo agnhost nonewprivs etcd sample-apiserver)
.build/test/kubernetes/e2e.test: $(call modules,kubernetes-e2e)
	@mkdir -p $(@D)
	@[[ $(call pinned,k8s.io/kubernetes,build/upstream/kubernetes-e2e) == $(KUBERNETES_VERSION) ]] || \
		{ echo "build/upstream/kubernetes-e2e/go.mod pins another Kubernetes than go.mod, which has $(KUBERNETES_VERSION)" >&2; exit 1; }
	$(STEP) "the end-to-end tests of Kubernetes $(KUBERNETES_VERSION)" bash -c 'cd build/upstream/kubernetes-e2e && CGO_ENABLED=0 go test -c -vet=off \
		-tags "netgo osusergo" -ldflags "-s -w $(call kubernetes_version,k8s.io/component-base/version,$(KUBERNETES_VERSION))" -o $(CURDIR)/$@ k8s.io/kubernetes/test/e2e && touch $(CURDIR)/$@'

.build/test/kubernetes/ginkgo: $(call modules,kubernetes-e2e)
	$(STEP) "ginkgo" bash -c '$(call upstream,kubernetes-e2e,github.com/onsi/ginkgo/v2/ginkgo,,)'

.build/test/kubernetes/agnhost .build/test/kubernetes/nonewprivs: $(call modules,kubernetes-e2e)
	$(STEP) "$(@F), for the tests" bash -c '$(call upstream,kubernetes-e2e,k8s.io/kubernetes/test/images/$(@F),,)'

.build/test/kubernetes/etcd: $(call modules,kubernetes-e2e)
	$(STEP) "etcd, for the tests" bash -c '$(call upstream,kubernetes-e2e,go.etcd.io/etcd/server/v3,,)'

.build/test/kubernetes/sample-apiserver: $(call modules,sample-apiserver)
	$(STEP) "the sample API server, for the tests" bash -c '$(call upstream,sample-apiserver,k8s.io/sample-apiserver,,)'

##@ Check

# The packages whose tests need that code: Istio's test harness, which they use, validates what istiod generates.
PGV_TESTS := ./pkg/mesh/dialect ./pkg/mesh/istiod
not_pgv_tests = grep -vxF $(patsubst ./%,-e polymesh.dev/polymesh/%,$(PGV_TESTS))

.PHONY: test
test: ## all tests: first the unit tests, then the end-to-end tests on dist/polymesh
	@build/stage unit $(MAKE) --no-print-directory test-unit
	@build/stage programs $(MAKE) --no-print-directory --keep-going --jobs 2 test-programs test-harness
	@build/stage end-to-end $(MAKE) --no-print-directory test-lanes

# The packages whose tests take longest run first, so that none of them runs alone at the end. Most of these wait, for leases, timeouts
# and rules, so twice as many run as there are cores: with fewer, the cores idle. `make lint` has vetted them. Control planes in a test's process
# are short of CPU and not of memory, so the garbage collector works less.
SLOW_TESTS := $(addprefix ./pkg/,controlplane/encryption controlplane/snapshot controlplane workflow/rollout node join controlplane/member mesh/install \
	workflow/image controlplane/datastore/etcd controlplane/datastore mesh/certify node/netpol node/registry workflow/bridge node/network controlplane/overview \
	workflow/deploy node/apilb)
UNIT_TESTS := $(SLOW_TESTS) ./pkg/... ./cmd/... ./build/... ./bench/... ./test/e2e/lanes

.PHONY: test-unit
test-unit: .build/images/bin/envoy .build/test/consul .build/test/kube-network-policies .build/test/versitygw .build/bin/containerd $(PAGE) .build/gotestsum | .build/packages .build/app-packages ## the tests next to the code
	@mkdir -p .build/times && rm -f .build/times/unit*.json .build/times/flaky-*
	@$(MAKE) --no-print-directory --keep-going --jobs 4 test-unit-main test-unit-pgv test-unit-inventory test-unit-observe

# REPEAT is how many failed tests at most run once more, in this stage and among the end-to-end tests. The check sets it, so that an hour is
# not lost to a test that fails by chance; flaky tests are printed at the end.
# $(call repeat_unit,SUITE)
repeat_unit = $(if $(REPEAT),--rerun-fails=1 --rerun-fails-max-failures=$(REPEAT) --rerun-fails-run-root-test --rerun-fails-report .build/times/flaky-$(1))

.PHONY: test-unit-main test-unit-pgv test-unit-inventory test-unit-observe
test-unit-main:
	GOGC=300 .build/gotestsum --format pkgname --jsonfile .build/times/unit.json $(call repeat_unit,unit) \
		--packages "$$(go list -tags "$(TAGS)" $(UNIT_TESTS) | $(not_pgv_tests) | tr '\n' ' ')" -- -p $$(($$(nproc) * 2)) -vet=off -tags "$(TAGS) integration"
	@# gotestsum repeats only the test that ran when a process ended without a panic: the package's other tests have not run then.
	@! { [ -s .build/times/flaky-unit ] && grep -hE '"Output":"(fatal error: |exit status ([2-9]|[1-9][0-9]))' .build/times/unit.json; }

test-unit-pgv:
	GOGC=300 .build/gotestsum --format pkgname --jsonfile .build/times/unit-pgv.json -- -p 1 -vet=off -tags "$(PLAIN_TAGS) integration" $(PGV_TESTS)

test-unit-inventory:
	cd build/inventory && CGO_ENABLED=0 $(CURDIR)/.build/gotestsum --format pkgname --jsonfile $(CURDIR)/.build/times/unit-inventory.json -- -vet=off ./...

# The tests of the store of metrics, logs and traces. They write and wait more than they compute.
test-unit-observe:
	cd observe && CGO_ENABLED=0 $(CURDIR)/.build/gotestsum --format pkgname --jsonfile $(CURDIR)/.build/times/unit-observe.json $(subst .build,$(CURDIR)/.build,$(call repeat_unit,observe)) \
		--packages ./... -- -p 3 -vet=off -tags "$(OBSERVE_TAGS)" $(if $(LONG),,-short)

# -test.short omits what only repeats what other tests show; LONG=1 runs that too.
.PHONY: test-e2e
test-e2e: test-programs ## the end-to-end tests, in network namespaces (root; RUN=<regexp> for some of them, LONG=1 with the long ones)
	@$(MAKE) --no-print-directory test-lanes

.PHONY: test-lanes
test-lanes:
	.build/test/run -run '$(RUN)' -repeat '$(or $(REPEAT),0)' $(if $(LONG),-timeout 24h,-- -test.short)

# The tests of the machines that end-to-end tests run on. They start no server.
.PHONY: test-harness
test-harness: all .build/gotestsum
	@mkdir -p .build/times
	.build/gotestsum --format testname --jsonfile .build/times/harness.json -- -tags "$(TAGS) e2e" -vet=off -count=1 ./test/e2e/node/... ./test/e2e/images/...

# Downloads and builds of other tools for most of the time, so something that needs the cores can run beside it.
.PHONY: test-images
test-images: all .build/app-packages
	$(STEP) "Debian packages of the tests" build/debian/install test
	test/e2e/prepare.sh

# Nothing is compiled while a node is tested: it would make the kubelet slow.
.PHONY: test-programs
test-programs: test-images all dist/polymesh-scanner .build/test/consul .build/test/kiali $(OLDER)/polymesh $(if $(LONG),$(OLDER)/agent) .build/test/e2e.test .build/test/run .build/gotestsum .build/app-packages ## all that the end-to-end tests would build
	$(STEP) "data dir from which nodes start" bash -c 'cd test/e2e && $(CURDIR)/.build/test/e2e.test -prepare'

.PHONY: slowest
slowest: .build/gotestsum ## the fifteen slowest tests of the last run
	@cat .build/times/*.json | .build/gotestsum tool slowest --num 15 --threshold 1s

.PHONY: test-all
test-all: test-unit test-harness ## test with the long ones, a real systemd, and what takes hours: both conformance suites, a thousand power cuts (root)
	@$(MAKE) --no-print-directory test-e2e LONG=1
	@$(MAKE) --no-print-directory test-unit-observe LONG=1
	POLYMESH_TEST_SYSTEMD=1 go test -tags "$(TAGS) integration" -count=1 -v -run '^TestSystemd$$' ./pkg/service
	@$(MAKE) --no-print-directory conformance
	POLYMESH_POWER_CUTS=1000 go test -tags "$(TAGS) e2e" -timeout 24h -count=1 -v -run '^TestPowerCut$$' ./test/e2e

.PHONY: test-examples
test-examples: .build/app-packages ## the tests of the example's five services, while their images are built (root)
	examples/polyglot/images.sh all

.PHONY: conformance
conformance: conformance-kubernetes conformance-network-policy conformance-gateway ## the conformance suites, one after the other

.PHONY: conformance-kubernetes
conformance-kubernetes: all $(CONFORMANCE) .build/app-packages ## Kubernetes' own suite; its report goes to docs/understand (root; FOCUS=<regexp> for a part, without the report)
	go test -tags "$(TAGS) e2e" -timeout 6h -count=1 -v -run '^(TestConformance|TestPage)$$' ./test/conformance/kubernetes -args \
		-focus '$(FOCUS)' $(if $(PROCS),-procs $(PROCS)) $(if $(LIMIT),-limit $(LIMIT)) $(if $(RESUME),-resume)

.PHONY: conformance-network-policy
conformance-network-policy: all $(CONFORMANCE) .build/app-packages ## Kubernetes' own tests of NetworkPolicies, which are no part of its conformance suite (root; FOCUS=<regexp> for a part)
	go test -tags "$(TAGS) e2e" -timeout 6h -count=1 -v -run '^TestNetworkPolicy$$' ./test/conformance/kubernetes -args \
		-focus '$(FOCUS)' $(if $(PROCS),-procs $(PROCS)) $(if $(LIMIT),-limit $(LIMIT))

.PHONY: conformance-gateway
conformance-gateway: all .build/app-packages ## Gateway API's own suite; its report goes to docs/mesh (root)
	go test -tags "$(TAGS) e2e" -timeout 150m -count=1 -v ./test/conformance/gatewayapi

.PHONY: cis
cis: all ## the checks of the CIS Kubernetes Benchmark; their report goes to docs/understand (root)
	go test -tags "$(TAGS) e2e" -timeout 20m -count=1 -v ./test/cis -args -report
