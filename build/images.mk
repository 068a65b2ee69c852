# The images that ship, as one archive.

IMAGE_PROGRAMS := $(addprefix .build/images/bin/,pause coredns metrics-server local-path-provisioner forward pilot-discovery pilot-agent envoy curl)
IMAGE_TAGS := pause=$(PAUSE_VERSION) coredns=$(COREDNS_VERSION:v%=%) metrics-server=$(METRICS_SERVER_VERSION) \
	local-path-provisioner=$(LOCAL_PATH_VERSION) forward=$(VERSION) busybox=$(BUSYBOX_VERSION) istio/pilot=$(ISTIO_TAG) istio/proxyv2=$(ISTIO_TAG)

.build/payload/images/polymesh.tar: $(IMAGE_PROGRAMS) .build/debian/drift build/versions.mk $(wildcard build/images/*.go build/compress/*.go)
	@mkdir -p $(@D)
	$(STEP) "images" bash -c 'go run -tags "$(TAGS)" ./build/images -programs .build/images/bin -debian .build/debian \
		-bootstrap "$$(go list -m -f "{{.Dir}}" istio.io/istio)/tools/packaging/common/envoy_bootstrap.json" \
		-registry $(IMAGE_REGISTRY) -envoy-version $(ENVOY_VERSION) -epoch $(SOURCE_DATE_EPOCH) -cache .build/cache -level $(ZSTD_LEVEL) -o $@ $(IMAGE_TAGS)'
