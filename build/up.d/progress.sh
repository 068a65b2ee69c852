# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# One line for each step, which is checked off with its time: in place on a terminal, plain lines elsewhere. A step is a shell
# function. It reports its result with `note`, and calls `changed` if it changed something; its output is kept in a log
# and shown if it fails.

begin_steps() {
    scratch=$(mktemp -d)
    step_pid=
    changes=0
    trap 'rm -rf "$scratch"' EXIT
    trap 'end_step; exit 130' INT TERM
}

# note TEXT: the text of the step's line; the last one counts. Called within a step.
note() {
    echo "$*" >"$scratch/note"
}

changed() {
    : >"$scratch/changed"
}

# end_step stops the running step, with all its processes.
end_step() {
    [[ -z $step_pid ]] || kill -- "-$step_pid" 2>/dev/null || true
}

# eventually SECONDS COMMAND...: retries until it succeeds; fails with its last output.
eventually() {
    local deadline=$((SECONDS + $1)) output
    shift
    until output=$("$@" 2>&1); do
        if ((SECONDS >= deadline)); then
            printf '%s\n' "$output" >&2
            return 1
        fi
        sleep 0.5
    done
    printf '%s\n' "$output"
}

elapsed() {
    awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { t = b - a; if (t >= 60) printf "%dm %02ds", t / 60, t % 60; else printf "%.1fs", t }'
}

step() {
    local title=$1 start=$EPOCHREALTIME code=0 said frame=0
    local frames=(⠋ ⠙ ⠹ ⠸ ⠼ ⠴ ⠦ ⠧ ⠇ ⠏)
    rm -f "$scratch/note" "$scratch/changed"
    set -m # a process group of its own, so that an interrupt can end all of it
    (set -e; "$2") >"$scratch/log" 2>&1 </dev/null &
    step_pid=$!
    set +m
    if [[ -t 1 ]]; then
        while kill -0 "$step_pid" 2>/dev/null; do
            printf '\r%s %s' "${frames[frame++ % ${#frames[@]}]}" "$title"
            sleep 0.1
        done
        printf '\r\e[K'
    else
        echo "  $title ..."
    fi
    wait "$step_pid" || code=$?
    step_pid=
    if ((code)); then
        echo "✗ $title  $(elapsed "$start")" >&2
        cat "$scratch/log" >&2
        explain_failure >&2
        exit 1
    fi
    said=$([[ ! -f $scratch/note ]] || cat "$scratch/note")
    if [[ -f $scratch/changed ]]; then
        changes=$((changes + 1))
    else
        said=${said:-unchanged}
    fi
    echo "✓ $title${said:+  $said}  $(elapsed "$start")"
}

show_changes() {
    ((changes)) || printf '\nEverything was there already; nothing was changed.\n'
}

# explain_failure prints where to find more information.
explain_failure() {
    if uses_systemd; then
        echo "The server's log: journalctl -u polymesh"
    elif [[ -s $server_log ]]; then
        echo "The server's log, $server_log, ends with:"
        tail -n 5 "$server_log"
    fi
}
