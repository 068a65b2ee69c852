# shellcheck shell=bash
# shellcheck disable=SC2034 # the other parts use these
# The settings of build/up and build/down, and how they call Polymesh.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

installed=/usr/local/bin/polymesh
program=$(realpath --no-symlinks "${POLYMESH_BIN:-$installed}")
data_dir=${POLYMESH_DATA_DIR:-/var/lib/polymesh}
kubeconfig=${POLYMESH_WRITE_KUBECONFIG:-${POLYMESH_KUBECONFIG:-/etc/polymesh/polymesh.yaml}}
state_dir=${POLYMESH_STATE_DIR:-/run/polymesh}
server_log=${POLYMESH_LOG:-/var/log/polymesh.log}
netns=${POLYMESH_NETNS:-}
pid_file=$state_dir/server.pid
running_file=$state_dir/running      # what the server was started as
data_mark=$data_dir/made-by-make-up  # build/down deletes no data without it

app=$top/examples/polyglot
namespace=polyglot-services
host=api.example.com

server_command=("$program" server --data-dir "$data_dir" --write-kubeconfig "$kubeconfig" --mesh-profile demo)
read -ra more_args <<<"${POLYMESH_SERVER_ARGS:-}"
server_command+=("${more_args[@]}")

# Polymesh's commands find their node through these.
export POLYMESH_DATA_DIR=$data_dir POLYMESH_WRITE_KUBECONFIG=$kubeconfig KUBECONFIG=$kubeconfig

# in_node runs a command in the node's network namespace.
in_node() {
    if [[ -n $netns ]]; then
        nsenter --net="/run/netns/$netns" -- "$@"
    else
        "$@"
    fi
}

kubectl() {
    in_node "$program" kubectl "$@"
}

uses_systemd() {
    [[ -d /run/systemd/system && -z ${POLYMESH_BIN:-} && -z $netns ]]
}

need_root() {
    if ((EUID)); then
        echo "$1 needs root: it installs a program and starts a node. Try: sudo $1" >&2
        exit 1
    fi
}
