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
((EUID == 0)) || { echo "make $(basename "$0") needs root: it changes programs and a node. Try: sudo make $(basename "$0")" >&2; exit 1; }

uses_systemd() { [[ -d /run/systemd/system && -z ${POLYMESH_BIN:-} && -z $netns ]]; }

# step TITLE FUNCTION [ARGUMENT...] shows a step with its time, and the function's output if it fails. build/step runs this script
# again for the function.
step() { (cd "$top" && STEP_LOGS=$state_dir/log build/step "$1" "$top/build/$(basename "$0")" "${@:2}" </dev/null); }

# server_pid prints the pid of the background server. After it has ended, another program may have the pid.
server_pid() {
    local pid
    pid=$(cat "$state_dir/server.pid" 2>/dev/null) && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- " server --data-dir $data_dir " && echo "$pid"
}

stop_server() {
    local pid
    pid=$(server_pid) || return 0
    kill "$pid"
    timeout 90 tail --pid="$pid" -f /dev/null || { echo "the server (pid $pid) does not end: see $server_log"; return 1; }
}

# data_id prints the id of the data dir, which a server creates once.
data_id() { sed -n 's/.*"id":"\([0-9a-f]*\)".*/\1/p' "$data_dir/polymesh.json" 2>/dev/null || true; }
