# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# Waiting until the node and the mesh are ready.

# kubectl comes from the data dir. Before the server has unpacked it there, it would be unpacked a second time.
api_answers() {
    server_is_unpacked && [[ -s $kubeconfig && $(kubectl get --raw /readyz 2>/dev/null) == ok ]]
}

wait_for_api() {
    local deadline=$((SECONDS + 180))
    until api_answers; do
        server_lives || { echo "the server has ended"; return 1; }
        ((SECONDS < deadline)) || { echo "the API server is not ready after 180 s"; return 1; }
        sleep 0.3
    done
    note "$(kubectl version -o json | awk -F'"' '/serverVersion/ {s = 1} s && /gitVersion/ {print $4}')"
}

# A unit that systemd is about to restart has failed, and the reason is in the journal.
server_lives() {
    if uses_systemd; then
        [[ $(systemctl show --property=SubState --value polymesh) != @(auto-restart|failed|dead) ]]
    else
        server_pid >/dev/null
    fi
}

has_node() {
    [[ -n $(kubectl get nodes -o name) ]]
}

wait_for_node() {
    eventually 120 has_node
    kubectl wait --for=condition=Ready node --all --timeout=180s
    note "$(kubectl get nodes -o jsonpath='{.items[0].metadata.name}')"
}

# wait_for_istio waits for the three deployments of the demo profile, and for the system's pods with them.
wait_for_istio() {
    local name
    for name in istiod istio-ingressgateway istio-egressgateway; do
        kubectl wait --for=create "deployment/$name" -n istio-system --timeout=300s
        kubectl rollout status "deployment/$name" -n istio-system --timeout=300s
    done
    for name in $(kubectl get deployments -n kube-system -o name); do
        kubectl rollout status "$name" -n kube-system --timeout=300s
    done
    note "$(kubectl get pods -n istio-system --no-headers | wc -l) pods in istio-system"
}
