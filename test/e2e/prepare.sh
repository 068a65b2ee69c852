#!/usr/bin/env bash
# Builds what the end-to-end tests use in addition to the shipped file: their images, the older Istio that an upgrade starts from,
# Java programs, the program that writes a vulnerability database. This is done before any node runs, because a compiler that
# runs at the same time would make the kubelet slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

step() { build/step "$@"; }

step "image of the tests' workload" test/e2e/images/build.sh echo
step "image of Jaeger" test/e2e/images/build.sh jaeger
step "the older Istio" test/e2e/images/old/build.sh
step "images of the example" examples/polyglot/images.sh all
step "base image of a Java runtime" examples/polyglot/images.sh jre
for dir in examples/spring-cloud test/e2e/springconsul; do
    step "Java programs of ${dir##*/}" mvn --batch-mode --no-transfer-progress --file "$dir" package
done
step "vulnerability database's writer" env CGO_ENABLED=0 go -C build/upstream/scanner build -tags "netgo osusergo" -o "$PWD/.build/test/database" ./database
