# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# Starting and stopping the server: a systemd unit, or a background process with a pid file.

# server_pid prints the pid of the background server, and fails if it is not running. The pid may have been reused, so the
# command line is compared, too.
server_pid() {
    local pid
    [[ -s $pid_file ]] || return 1
    pid=$(<"$pid_file")
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "server --data-dir $data_dir " || return 1
    echo "$pid"
}

server_runs() {
    if uses_systemd; then
        systemctl is-active --quiet polymesh
    else
        server_pid >/dev/null
    fi
}

# server_is_unpacked: the launcher has become the program in the data dir. (systemctl start has waited for that.)
server_is_unpacked() {
    uses_systemd || [[ $(readlink "/proc/$(server_pid)/exe") == "$data_dir"/* ]]
}

# A server that was started from a different file or with other flags must be restarted.
server_fingerprint() {
    echo "$(sha256sum <"$program") ${server_command[*]} $netns"
}

start_server() {
    local wanted
    wanted=$(server_fingerprint)
    mkdir -p "$state_dir"
    if [[ ! -e $data_dir ]]; then
        install -d -m 0700 "$data_dir"
        : >"$data_mark"
    fi
    if server_runs; then
        if [[ -f $running_file && $(<"$running_file") == "$wanted" ]]; then
            note "already running"
            return
        fi
        note "restarted"
    else
        note "started"
    fi
    changed
    if uses_systemd; then
        systemctl enable --quiet polymesh
        timeout 300 systemctl restart polymesh
    else
        end_background_server
        # Without a service manager the log is rotated at startup. The previous one is kept.
        if [[ -f $server_log && $(stat -c %s "$server_log") -gt $((50 << 20)) ]]; then
            mv -f "$server_log" "$server_log.1"
        fi
        (umask 077 && : >>"$server_log")
        in_session "${server_command[@]}" >>"$server_log" 2>&1 </dev/null &
        echo $! >"$pid_file"
    fi
    echo "$wanted" >"$running_file"
}

# in_session runs the command in its own session, which outlives this script. Its pid is that of the caller.
in_session() {
    if [[ -n $netns ]]; then
        exec setsid nsenter --net="/run/netns/$netns" -- "$@"
    fi
    exec setsid "$@"
}

end_background_server() {
    local pid
    pid=$(server_pid) || return 0
    kill "$pid"
    timeout 90 tail --pid="$pid" -f /dev/null ||
        { echo "the server (pid $pid) does not stop: see $server_log"; return 1; }
}

stop_server() {
    local was_running=
    ! server_runs || was_running=yes
    if uses_systemd; then
        # "Restart=always" keeps a failed unit activating, which is not running, and still has to be stopped.
        [[ ! -f $unit ]] || systemctl disable --now --quiet polymesh
    else
        end_background_server
    fi
    rm -f "$pid_file" "$running_file"
    if [[ -n $was_running ]]; then
        changed
        note "stopped"
    else
        note "was not running"
    fi
}

reset_machine() {
    local with=$program
    [[ -x $with ]] || with=$top/dist/polymesh
    if [[ ! -e $data_dir ]]; then
        note "nothing there"
    elif [[ ! -e $data_mark ]]; then
        note "kept: $data_dir is older than make up. To remove it: $with reset"
    elif [[ -x $with ]]; then
        in_node "$with" reset --yes --data-dir "$data_dir" --kubeconfig "$kubeconfig"
        changed
        note "removed"
    else
        echo "$data_dir is there, but neither $program nor dist/polymesh that could remove it: run make"
        return 1
    fi
    rm -f "$server_log" "$server_log.1"
    [[ ! -d $state_dir ]] || rmdir --ignore-fail-on-non-empty "$state_dir"
}
