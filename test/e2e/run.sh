#!/usr/bin/env bash
# Runs the end-to-end tests, `run.sh TEST-PROGRAM TAGS`, in two lanes beside each other: either waits more than it works.
# What the second one prints comes at the end. The events of all tests go to .build/times, for `make slowest`.
set -euo pipefail
set -m # each lane is a process group, so that all of it can be ended
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The second lane: tests that start nodes of their own, and then some of those that share one, so that the lanes take about
# as long.
own='^Test(AirGap|BadInput|Crash|MachineChanges|PowerCut|Reset|ResetRefusesAForeignFolder|Restart|SupplyChain|TaintWithoutRoomForIstio|Upgrade|UserCA)$'
moved='^Test(Consul|NewProject|SpringCloud|Walk)$'
program=$(realpath "$1")
tags=$2
gotestsum=$PWD/.build/gotestsum
times=$PWD/.build/times
mkdir -p "$times"
rm -f "$times"/e2e-*.json
folder=$(mktemp -d)
chmod 755 "$folder" # a test runs the program there as nobody
lanes=()
# A test that is ended takes its nodes away.
trap 'for lane in "${lanes[@]}"; do kill -- -"$lane" 2>/dev/null || true; done; wait; rm -f "$folder/log"; rmdir "$folder" 2>/dev/null || true' EXIT

# tests NAME FLAG...: the test program, in the folder of its sources.
tests() {
    local name=$1
    shift
    (cd test/e2e && "$gotestsum" --format standard-verbose --jsonfile "$times/e2e-$name.json" --raw-command -- \
        go tool test2json -t -p polymesh.dev/polymesh/test/e2e "$program" -test.v=test2json -test.timeout=75m "$@")
}

first_lane() {
    local code=0
    "$gotestsum" --format standard-verbose --jsonfile "$times/e2e-harness.json" -- -tags "$tags" -vet=off -count=1 \
        ./test/e2e/node/... ./test/e2e/images/... || code=1
    tests shared -test.skip "$own|$moved" || code=1
    return "$code"
}

second_lane() {
    local code=0
    # A folder of its own: when the tests begin they remove what dead ones left in theirs.
    export TMPDIR=$folder
    tests own -test.run "$own" || code=1
    tests moved -test.run "$moved" || code=1
    return "$code"
}

first_lane &
lanes+=($!)
second_lane >"$folder/log" 2>&1 &
lanes+=($!)
code=0
for lane in "${lanes[@]}"; do
    wait "$lane" || code=1
done
lanes=()
cat "$folder/log"
exit "$code"
