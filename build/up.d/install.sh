# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# The program, the links kubectl and istioctl, and the systemd unit. What is installed is listed in a file, and
# remove_program removes what is listed there.

install_list=/usr/local/lib/polymesh/installed-by-make-up
unit=/etc/systemd/system/polymesh.service

# remember FILE: record that it is ours to remove.
remember() {
    mkdir -p "$(dirname "$install_list")"
    grep -qxF "$1" "$install_list" 2>/dev/null || echo "$1" >>"$install_list"
}

is_ours() {
    grep -qxF "$1" "$install_list" 2>/dev/null
}

install_program() {
    local built=$top/dist/polymesh name
    if [[ -n ${POLYMESH_BIN:-} ]]; then
        [[ -x $program ]] || { echo "POLYMESH_BIN=$program is no program"; return 1; }
        note "not installed"
        return
    fi
    [[ -x $built ]] || { echo "$built is not there: run make"; return 1; }
    if ! cmp -s "$built" "$program"; then
        # Written next to it and renamed: the old one may be running.
        remember "$program"
        install -D -m 0755 "$built" "$program.new"
        mv "$program.new" "$program"
        changed
        note "installed"
    fi
    for name in kubectl istioctl; do
        if ! command -v "$name" >/dev/null; then
            remember "/usr/local/bin/$name"
            ln -s polymesh "/usr/local/bin/$name"
            changed
        fi
    done
    uses_systemd || return 0
    if [[ ! -f $unit || $(<"$unit") != "$(unit_file)" ]]; then
        if [[ -f $unit ]] && ! is_ours "$unit"; then
            echo "$unit is there and is not from make up: remove it, or start the server with it and set POLYMESH_BIN"
            return 1
        fi
        remember "$unit"
        unit_file >"$unit"
        systemctl daemon-reload
        changed
    fi
}

# Killing only the server keeps the pods running during a restart; it manages the cgroups below it itself.
unit_file() {
    cat <<EOF
[Unit]
Description=Polymesh: Kubernetes and Istio
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
EnvironmentFile=-/etc/default/polymesh
ExecStart=${server_command[*]}
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s

[Install]
WantedBy=multi-user.target
EOF
}

remove_program() {
    local file
    [[ -f $install_list ]] || { note "there are none"; return; }
    while read -r file; do
        # A program that the user has since put there is the user's.
        [[ $file == */bin/*ctl && $(readlink "$file") != polymesh ]] || rm -f "$file"
    done <"$install_list"
    if grep -qxF "$unit" "$install_list" && [[ -d /run/systemd/system ]]; then
        systemctl daemon-reload
    fi
    rm -f "$install_list"
    rmdir --ignore-fail-on-non-empty "$(dirname "$install_list")"
    changed
    note "removed"
}
