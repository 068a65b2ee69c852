# shellcheck shell=bash disable=SC2154 # settings.sh has the variables
# The app: what the guide's deploy.sh does, and the guide's two requests.

# apply ARGUMENT...: kubectl apply, which reports for each object whether it changed.
apply() {
    local output applied code=0
    output=$(kubectl apply "$@") || code=$?
    printf '%s\n' "$output"
    applied=$(grep -v ' unchanged$' <<<"$output" | grep -c . || true)
    if ((applied)); then
        changed
        note "$applied applied"
    fi
    return "$code"
}

apply_namespace() {
    apply -f "$app/k8s/namespace.yaml"
}

# The value reaches kubectl through a pipe: command lines are visible to all local users.
apply_database_secret() {
    local url=${DATABASE_URL:-postgresql://user:pass@postgres.external.example.com:5432/mydb}
    if [[ -z ${DATABASE_URL:-} ]] && kubectl get secret db-credentials -n "$namespace" >/dev/null 2>&1; then
        return
    fi
    printf %s "$url" |
        kubectl create secret generic db-credentials --from-file=url=/dev/stdin -n "$namespace" --dry-run=client -o yaml |
        apply -f -
}

# The Gateway's port 443 needs example-com-cert, in the namespace of the gateway's pods. A self-signed one is used until there
# is a real one.
apply_certificate() {
    local dir=$scratch/certificate
    if kubectl get secret example-com-cert -n istio-system >/dev/null 2>&1; then
        return
    fi
    (umask 077 && mkdir "$dir")
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=$host" \
        -addext "subjectAltName=DNS:$host,DNS:*.example.com" -keyout "$dir/key.pem" -out "$dir/cert.pem"
    kubectl create secret tls example-com-cert --key "$dir/key.pem" --cert "$dir/cert.pem" -n istio-system
    changed
    note "self-signed"
}

apply_services() {
    apply -f "$app/k8s/fastapi/" -f "$app/k8s/go/" -n "$namespace"
}

# istiod's webhook checks these, and may take a moment longer than istiod itself.
apply_mesh() {
    eventually 60 apply -f "$app/istio/"
}

wait_for_pods() {
    local name
    for name in fastapi-service go-service; do
        kubectl rollout status "deployment/$name" -n "$namespace" --timeout=300s
    done
    note "$(kubectl get pods -n "$namespace" --no-headers | wc -l) pods in $namespace"
}

gateway_address() {
    kubectl get service istio-ingressgateway -n istio-system -o jsonpath='{.status.loadBalancer.ingress[0].ip}'
}

# request PATH [OPTION...]: one request through the gateway, from outside the mesh.
request() {
    local path=$1
    shift
    in_node curl --noproxy '*' --silent --show-error --fail-with-body --max-time 20 --header "Host: $host" "$@" \
        "http://$(gateway_address)$path"
}

predict() {
    request /api/v1/predict -X POST --header "Content-Type: application/json" --data '{"data": [1.0, 2.0, 3.0]}'
}

call_go() {
    request /api/v1/call-go
}

# The responses are checked, not only shown: 2 is the mean of 1, 2 and 3.
predict_is_right() {
    [[ $(predict) == '{"prediction":2.0,"confidence":0.95}' ]] || { predict; return 1; }
}

call_go_is_right() {
    [[ $(call_go) == *'"go_service_response":{"status":"healthy"'* ]] || { call_go; return 1; }
}

ask_gateway() {
    kubectl wait --for=jsonpath='{.status.loadBalancer.ingress[0].ip}' service/istio-ingressgateway -n istio-system --timeout=60s
    eventually 60 predict_is_right
    eventually 60 call_go_is_right
    note "$(gateway_address)"
}

show_pods() {
    echo
    kubectl get pods -n "$namespace"
}

show_answers() {
    local address
    address=$(gateway_address)
    cat <<EOF

curl http://$address/api/v1/predict -X POST -H "Content-Type: application/json" -H "Host: $host" -d '{"data": [1.0, 2.0, 3.0]}'
$(predict)

curl http://$address/api/v1/call-go -H "Host: $host"
$(call_go)
EOF
}

show_next() {
    local kubectl="$program kubectl" istioctl="$program istioctl"
    if [[ -z ${POLYMESH_BIN:-} ]]; then
        [[ $(readlink "$(type -P kubectl)") != polymesh ]] && kubectl="polymesh kubectl" || kubectl=kubectl
        [[ $(readlink "$(type -P istioctl)") != polymesh ]] && istioctl="polymesh istioctl" || istioctl=istioctl
    fi
    cat <<EOF

Next:
  export KUBECONFIG=$kubeconfig
  $kubectl get pods -A
  $kubectl port-forward svc/istio-ingressgateway -n istio-system 8080:80    # the guide's way in: http://localhost:8080
  $kubectl set image deployment/fastapi-service fastapi=my-registry/fastapi-service:1.0.1 -n $namespace
  $istioctl proxy-status
  make down
EOF
}
