# What runs dist/polymesh on this machine, and what looks after the tree.

##@ Use

.PHONY: up
up: ## build, start, deploy the guide's app (root)
	@$(MAKE) --no-print-directory all .build/app-packages
	$(STEP) "images of the example" examples/polyglot/images.sh
	@build/up

.PHONY: down
down: ## undo `make up`, and remove its data (ARGS=--yes does not ask)
	@build/down $(ARGS)

.PHONY: debian-lock
debian-lock: ## pin the Debian packages that the archive has now
	build/debian/lock

.PHONY: clean
clean: ## remove what was built; Go's own cache stays
	rm -rf .build dist

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
