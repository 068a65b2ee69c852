# polymesh-observe, the store of metrics, logs and traces: a Go module of its own, in observe/, with the page that it serves.

# Without the ways of discovery that the page and the store do not have: each brings the client of a cloud.
OBSERVE_TAGS := netgo osusergo remove_all_sd enable_kubernetes_sd enable_dns_sd

# npm ci writes this file. Scripts of packages do not run.
PAGE_PACKAGES := observe/web/node_modules/.package-lock.json
$(PAGE_PACKAGES): observe/web/package.json observe/web/package-lock.json build/debian/machine-packages | .build/packages
	$(STEP) "npm packages of the page" bash -c '{ command -v node && command -v npm || build/debian/install page; } && cd observe/web && npm ci --ignore-scripts --no-audit --no-fund'
	@touch $@

# The others have names with the hash of their contents.
PAGE := observe/page/dist/index.html.gz
$(PAGE): $(shell find observe/web -name node_modules -prune -o -path observe/web/test -prune -o -type f -print) $(PAGE_PACKAGES)
	$(STEP) "page" bash -c 'cd observe/web && node build.mjs'
	@touch $@

OBSERVE_SOURCES := $(shell find observe \( -path observe/web -o -path observe/page/dist -o -name testdata \) -prune -o -type f ! -name '*_test.go' -print | LC_ALL=C sort)
.build/observe-sources: force
	@mkdir -p .build && printf '%s\n' "$(OBSERVE_TAGS)" $(OBSERVE_SOURCES) >$@.new && { cmp -s $@.new $@ && rm $@.new || mv $@.new $@; }

.build/made/polymesh-observe: $(OBSERVE_SOURCES) .build/observe-sources $(PAGE) build/versions.mk | .build/packages
	@mkdir -p $(@D)
	$(STEP) "polymesh-observe" bash -c 'cd observe && CGO_ENABLED=0 go build -tags "$(OBSERVE_TAGS)" -ldflags "-s -w -X main.version=$(VERSION)" -o $(CURDIR)/$@ ./cmd/polymesh-observe && touch $(CURDIR)/$@'

.build/bin/polymesh-observe: .build/made/polymesh-observe
	@mkdir -p $(@D) && { cmp -s $< $@ || cp $< $@; }

# Of the packages that are in the page, not of those that build it.
observe_inventory = -npm-lock observe/web/package-lock.json -npm-packages observe/web/node_modules -npm-user polymesh-observe
