# dist/polymesh: what is packed next to the images, its licences and its bill of materials. And dist/polymesh-scanner.

# What the channel's own kustomization lists, without the admission policy that tells a user which CRDs to install.
# Its files come out of the pinned module.
.build/payload/manifests/gateway-api.yaml: go.mod go.sum | .build/packages
	@mkdir -p $(@D)
	$(STEP) "CRDs of Gateway API $(GATEWAY_API_VERSION)" bash -ec 'go mod download sigs.k8s.io/gateway-api && \
		cd "$$(go list -m -f "{{.Dir}}" sigs.k8s.io/gateway-api)/config/crd/experimental" && \
		for file in $$(sed -n "s/^- //p" kustomization.yaml | grep -v _vap_); do echo ---; cat "$$file"; done >$(CURDIR)/$@'

HOST_PROGRAMS := .build/bin/polymesh .build/bin/containerd .build/bin/containerd-shim-runc-v2 .build/bin/runc \
	$(patsubst %,.build/bin/cni/%,$(notdir $(CNI_PLUGINS))) .build/bin/polymesh-observe
# Everything that ships, for the bill of materials.
SHIPPED := $(HOST_PROGRAMS) .build/launcher $(IMAGE_PROGRAMS)

INVENTORY := .build/inventory
$(INVENTORY): $(wildcard build/inventory/*.go) build/inventory/go.mod build/inventory/go.sum | .build/packages
	$(STEP) "inventory of what ships" bash -c 'cd build/inventory && CGO_ENABLED=0 go build -o $(CURDIR)/$@ . && touch $(CURDIR)/$@'

MODULE_DIRS := . observe $(patsubst %,build/upstream/%,containerd runc cni coredns metrics-server local-path-provisioner)
inventory = $(INVENTORY) -version $(VERSION) -date $(BUILD_DATE) -debian-lock build/debian/packages.lock -debian .build/debian \
	-source-lock build/debian/sources.lock -sources .build/debian/source -wheel-lock build/envoy/requirements.txt -modules "$(MODULE_DIRS)" -c-programs "pause=k8s.io/kubernetes@$(KUBERNETES_VERSION)" $(observe_inventory) $(1) $(SHIPPED)

.build/licenses/index.txt: $(SHIPPED) $(PAGE_PACKAGES) .build/debian/drift .build/debian/source/drift $(INVENTORY)
	$(STEP) "licences of what ships" $(call inventory,-licenses .build/licenses)

dist/polymesh.cdx.json: dist/polymesh $(INVENTORY)
	$(STEP) "bill of materials" $(call inventory,-sbom $@ -subject dist/polymesh)

# $(call pack,<the program>,<version>,<level of what is not in the cache yet>)
pack = go run -tags "$(TAGS)" ./build/payload -version $(2) -launcher .build/launcher -epoch $(SOURCE_DATE_EPOCH) -cache .build/cache -level $(3) -o $@ \
	bin/polymesh=$(1) $(foreach program,$(filter-out .build/bin/polymesh,$(HOST_PROGRAMS)),$(program:.build/%=%)=$(program)) \
	bin=.build/host/bin images=.build/payload/images manifests=.build/payload/manifests licenses=.build/licenses

dist/polymesh: $(HOST_PROGRAMS) .build/launcher .build/host/bin/nft .build/payload/images/polymesh.tar .build/payload/manifests/gateway-api.yaml .build/licenses/index.txt $(wildcard build/payload/*.go build/compress/*.go)
	$(STEP) "dist/polymesh" bash -c '$(call pack,.build/bin/polymesh,$(VERSION),$(ZSTD_LEVEL))'
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
