package main

import (
	"errors"
	"regexp"
	"strings"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
)

// prometheusCluster is the cluster behind Envoy's port for Prometheus in Istio's bootstrap template, up to its address.
var prometheusCluster = regexp.MustCompile(`("name": "prometheus_stats",(?s:.*?)"address":\s*)\{\s*"socket_address": \{[^{}]*\{\{ \.localhost \}\}[^{}]*\{\{ \.config\.ProxyAdminPort \}\}\s*\}\s*\}`)

// withExposition redirects scrapes of Envoy's Prometheus port to the agent, instead of Envoy's admin interface: the
// agent has the same statistics under Istio's names. The rest of Istio's template is unchanged.
func withExposition(template string) (string, error) {
	if n := len(prometheusCluster.FindAllStringIndex(template, -1)); n != 1 || strings.Count(template, `"name": "prometheus_stats"`) != 1 {
		return "", errors.New("the cluster prometheus_stats is not where it used to be in Istio's bootstrap template")
	}
	return prometheusCluster.ReplaceAllString(template, `${1}{"pipe": {"path": "`+exposition.Socket+`"}}`), nil
}
