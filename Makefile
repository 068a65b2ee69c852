# Builds dist/polymesh, the one file that ships. `make help` lists the targets; docs/understand/build.md tells how it works.
# The rules are in build/*.mk, by theme; what several themes use is here.
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
KIALI_VERSION := $(call pinned,github.com/kiali/kiali,build/upstream/kiali)
SYFT_VERSION := $(call pinned,github.com/anchore/syft,build/upstream/scanner)
BUSYBOX_VERSION := $(shell awk '$$1 == "busybox-static" {sub(/^[0-9]+:/, "", $$2); gsub(/\+/, "-", $$2); print $$2}' build/debian/packages.lock)
# version of a Debian source package: $(call source_version,<package>)
source_version = $(shell awk '$$1 == "$(1)" {print $$3}' build/debian/sources.lock)
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

# While developing and in CI, `make ZSTD_LEVEL=3` saves the minutes that the last tenth of the size costs. What ships has 19.
ZSTD_LEVEL ?= 19

STEP := @build/step

##@ Build

.PHONY: all
all: dist/polymesh dist/polymesh.cdx.json ## dist/polymesh and its bill of materials (what a bare `make` does)
	@echo "dist/polymesh is up to date: $$(stat -c %s dist/polymesh | awk '{printf "%.1f MB", $$1 / 1e6}')"

include $(foreach theme,programs upstream observe images payload test check use,build/$(theme).mk)
