#!/usr/bin/env bash
# Runs the end-to-end tests, `run.sh TAGS`, in two lanes beside each other: either waits more than it works. What the second
# one says comes at the end.
set -euo pipefail
set -m # each lane is a process group, so that all of it can be ended

# The second lane: tests that start nodes of their own, and then some of those that share one, so that the lanes take about
# as long.
own='^Test(AirGap|BadInput|Crash|PowerCut|Reset|ResetRefusesAForeignFolder|Restart|SupplyChain|TaintWithoutRoomForIstio|Upgrade|UserCA)$'
moved='^Test(Consul|NewProject|SpringCloud)$'
tags=$1
folder=$(mktemp -d)
chmod 755 "$folder" # a test runs the program there as nobody
lanes=()
# A test that is told to end takes its nodes away.
trap 'for lane in "${lanes[@]}"; do kill -- -"$lane" 2>/dev/null || true; done; wait; rm -f "$folder/log"; rmdir "$folder" 2>/dev/null || true' EXIT

tests() {
    go test -tags "$tags" -timeout 75m -count=1 -v "$@"
}

second_lane() {
    local code=0
    # A folder of its own: when the tests begin they remove what dead ones left in theirs.
    export TMPDIR=$folder
    tests -run "$own" ./test/e2e || code=1
    tests -run "$moved" ./test/e2e || code=1
    return "$code"
}

tests -skip "$own|$moved" ./test/e2e/... &
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
