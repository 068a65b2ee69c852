package scrapeconfig

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v2"
)

// keys are the keys of a section that a user may write. nil means everything below is allowed, and "*" any key.
//
// Everything else is refused, so a key that a later Prometheus adds is refused until it is added here.
type keys map[string]keys

var (
	discoveryKeys = map[string]keys{
		"static_configs": nil,
		"kubernetes_sd_configs": {
			"role": nil, "namespaces": nil, "selectors": nil, "attach_metadata": nil, "follow_redirects": nil, "enable_http2": nil,
		},
		"dns_sd_configs": nil,
	}
	scrapeKeys = with(discoveryKeys, keys{
		"job_name": nil, "honor_labels": nil, "honor_timestamps": nil, "track_timestamps_staleness": nil, "params": nil,
		"scrape_interval": nil, "scrape_timeout": nil, "scrape_protocols": nil, "fallback_scrape_protocol": nil,
		"scrape_native_histograms": nil, "always_scrape_classic_histograms": nil, "convert_classic_histograms_to_nhcb": nil,
		"metrics_path": nil, "scheme": nil, "enable_compression": nil, "extra_scrape_metrics": nil,
		"body_size_limit": nil, "sample_limit": nil, "target_limit": nil, "label_limit": nil, "label_name_length_limit": nil,
		"label_value_length_limit": nil, "native_histogram_bucket_limit": nil, "native_histogram_min_bucket_factor": nil,
		"keep_dropped_targets": nil, "metric_name_validation_scheme": nil, "metric_name_escaping_scheme": nil,
		"basic_auth":    {"username": nil, "password": nil},
		"authorization": {"type": nil, "credentials": nil},
		"bearer_token":  nil,
		"tls_config": {
			"ca": nil, "cert": nil, "key": nil, "server_name": nil, "insecure_skip_verify": nil, "min_version": nil, "max_version": nil,
		},
		"follow_redirects": nil, "enable_http2": nil,
		"http_headers":    {"*": {"values": nil, "secrets": nil}},
		"relabel_configs": nil, "metric_relabel_configs": nil,
	})
	managerKeys = with(discoveryKeys, keys{
		"scheme": nil, "path_prefix": nil, "timeout": nil, "api_version": nil, "relabel_configs": nil,
		"follow_redirects": nil, "enable_http2": nil,
	})
)

func with(a, b keys) keys {
	all := keys{}
	for _, m := range []keys{a, b} {
		for k, v := range m {
			all[k] = v
		}
	}
	return all
}

// refusals lists the keys of a section of Prometheus' configuration that are not allowed, with reasons. It checks what
// Prometheus has parsed, because that takes effect, and not the user's text.
func refusals(section any, allowed keys) []string {
	text, err := yaml.Marshal(section)
	if err != nil {
		return []string{"it cannot be read back: " + err.Error()}
	}
	var tree map[any]any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		return []string{"it cannot be read back: " + err.Error()}
	}
	var found []string
	walk("", tree, allowed, &found)
	slices.Sort(found)
	return found
}

func walk(path string, node any, allowed keys, found *[]string) {
	if allowed == nil {
		return
	}
	switch node := node.(type) {
	case []any:
		for _, n := range node {
			walk(path, n, allowed, found)
		}
	case map[any]any:
		for k, v := range node {
			if empty(v) {
				continue // Prometheus writes some keys that are not set
			}
			key := fmt.Sprint(k)
			below, ok := allowed[key]
			if !ok {
				below, ok = allowed["*"]
			}
			if !ok {
				*found = append(*found, refusal(strings.TrimPrefix(path+"."+key, "."), key))
				continue
			}
			walk(path+"."+key, v, below, found)
		}
	}
}

func empty(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Map, reflect.Slice:
		return r.Len() == 0
	default:
		return r.IsZero()
	}
}

func refusal(path, key string) string {
	switch {
	case key == "file_sd_configs", key == "files", strings.HasSuffix(key, "_file"):
		return path + " is not allowed, as the file would be one of the machine's: write its content here, or use a Prometheus in a pod"
	case key == "http_sd_configs":
		return path + " is not allowed, as Prometheus reads its answer whole, however long it is: use kubernetes_sd_configs or dns_sd_configs"
	case key == "api_server":
		return path + " is not allowed, as only this cluster is asked: leave it out"
	case key == "oauth2", strings.HasPrefix(key, "proxy_"), key == "no_proxy":
		return path + " is not allowed, as it connects the machine to somewhere else than the target"
	}
	return path + " is not supported"
}
