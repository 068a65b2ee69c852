#!/usr/bin/env bash
# Runs the end-to-end tests, `run.sh TAGS`: those that start nodes of their own beside those that share one. Either lane
# waits more than it works. What the second one says comes at the end.
set -euo pipefail

own='^Test(AirGap|BadInput|Crash|Reset|ResetRefusesAForeignFolder|Restart|SupplyChain|TaintWithoutRoomForIstio|Upgrade|UserCA)$'
folder=$(mktemp -d)
chmod 755 "$folder" # a test runs the program there as nobody
second=
# A test that is told to end takes its nodes away.
trap '[[ -z $second ]] || kill "$second" 2>/dev/null || true; wait; rm -f "$folder/log"; rmdir "$folder" 2>/dev/null || true' EXIT

tests() {
    go test -tags "$1" -timeout 75m -count=1 -v "${@:2}"
}

# A folder of its own: when the tests begin they remove what dead ones left in theirs.
TMPDIR=$folder tests "$1" -run "$own" ./test/e2e >"$folder/log" 2>&1 &
second=$!
code=0
tests "$1" -skip "$own" ./test/e2e/... || code=1
wait "$second" || code=1
second=
cat "$folder/log"
exit "$code"
