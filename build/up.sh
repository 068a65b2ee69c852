# shellcheck shell=bash
# shellcheck disable=SC2034 # build/up and build/down use these
# What build/up and build/down have in common: settings, steps, and the server of a machine without systemd.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(realpath --no-symlinks "${POLYMESH_BIN:-/usr/local/bin/polymesh}")
data_dir=${POLYMESH_DATA_DIR:-/var/lib/polymesh}
kubeconfig=${POLYMESH_WRITE_KUBECONFIG:-${POLYMESH_KUBECONFIG:-/etc/polymesh/polymesh.yaml}}
state_dir=${POLYMESH_STATE_DIR:-/var/lib/polymesh-up}
server_log=${POLYMESH_LOG:-/var/log/polymesh.log}
netns=${POLYMESH_NETNS:-}
enter=() # runs a command where the node's network is
[[ -z $netns ]] || enter=(nsenter --net="/run/netns/$netns" --)
read -ra server_args <<<"--data-dir $data_dir --write-kubeconfig $kubeconfig --mesh-profile demo ${POLYMESH_SERVER_ARGS:-}"
# The commands of Polymesh find their node by these.
export POLYMESH_DATA_DIR=$data_dir POLYMESH_WRITE_KUBECONFIG=$kubeconfig KUBECONFIG=$kubeconfig
scratch=$(mktemp -d)
step_pid=
trap 'rm -rf "$scratch"' EXIT
trap '[[ -z $step_pid ]] || kill -- "-$step_pid"; exit 130' INT TERM
((EUID == 0)) || { echo "make $(basename "$0") needs root: it works on programs and a node. Try: sudo make $(basename "$0")" >&2; exit 1; }

uses_systemd() { [[ -d /run/systemd/system && -z ${POLYMESH_BIN:-} && -z $netns ]]; }

# note TEXT is shown with the step; changed TEXT says too that it has changed something.
note() { echo "  $*" >"$scratch/note"; }
changed() { note "$*"; : >"$scratch/changed"; }

# step TITLE COMMAND...: one line, which ticks off with its time. The output is shown when the command fails.
step() {
    local title=$1 start=$EPOCHREALTIME code=0 log="The server's log: journalctl -u polymesh"
    [[ -t 1 ]] && printf '  %s ...' "$title" || echo "  $title ..."
    : >"$scratch/note"
    set -m # a process group of its own, so that an interrupt can end all of it; in the background, so that set -e holds
    (set -e; "${@:2}") >"$scratch/log" 2>&1 </dev/null &
    step_pid=$!
    set +m
    wait "$step_pid" || code=$?
    step_pid=
    [[ ! -t 1 ]] || printf '\r\e[K'
    if ((code)); then
        uses_systemd || log="The server's log, $server_log, ends with:"$'\n'$(tail -n 5 "$server_log" || true)
        printf '%s\n' "✗ $title" "$(<"$scratch/log")" "$log" >&2
        exit 1
    fi
    echo "✓ $title$(<"$scratch/note")  $(awk "BEGIN { printf \"%.1fs\", $EPOCHREALTIME - $start }")"
}

# eventually SECONDS COMMAND...: tries until it succeeds, or says by code 99 that it never will; shows its last output.
eventually() {
    local deadline=$((SECONDS + $1)) code
    while code=0; "${@:2}" >"$scratch/try" 2>&1 || code=$?; ((code != 0 && code != 99 && SECONDS < deadline)); do sleep 0.5; done
    cat "$scratch/try"
    return "$code"
}

# server_pid prints the pid of the background server. A pid alone may be another program's by now.
server_pid() {
    local pid
    pid=$(cat "$state_dir/server.pid" 2>/dev/null) && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- " server --data-dir $data_dir " && echo "$pid"
}

stop_background_server() {
    local pid
    pid=$(server_pid) || return 0
    kill "$pid"
    timeout 90 tail --pid="$pid" -f /dev/null || { echo "the server (pid $pid) does not end: see $server_log"; return 1; }
    changed stopped
}

# data_id prints the id of the data dir, which a server makes once.
data_id() { sed -n 's/.*"id":"\([0-9a-f]*\)".*/\1/p' "$data_dir/polymesh.json" 2>/dev/null || true; }
