package dialect

import (
	"fmt"
	"slices"
	"strings"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	logdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	statslog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	transform "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/actions/transform_stat/v3"
	taginput "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/stats/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"istio.io/api/envoy/extensions/stats"
)

// This file turns istio.stats into envoy.access_loggers.stats: a counter or histogram for each of Istio's metrics, with
// tags from format strings. Names, tags and values are those of Envoy's contrib/istio/filters/http/istio_stats.

const (
	statsLogger = "envoy.access_loggers.stats"
	// statsScope is shared by all loggers of a proxy, so that one stat is one stat.
	statsScope = "istio"
	unknown    = "unknown"
)

// Proxy is the workload behind a proxy, as Istio's metrics name it.
type Proxy struct {
	Workload          string
	Namespace         string
	App               string
	Version           string
	CanonicalService  string
	CanonicalRevision string
	Cluster           string
}

// noteDirection tells the rules below which side of a request the listener is on.
func noteDirection(s *surroundings, l *listener.Listener) (bool, error) {
	s.inbound = l.TrafficDirection == core.TrafficDirection_INBOUND
	return false, nil
}

func translateHTTPStats(s *surroundings, m *hcm.HttpConnectionManager) (bool, error) {
	for _, f := range m.HttpFilters {
		config, err := pluginConfig(f.GetTypedConfig())
		if err != nil || config == nil {
			if err != nil {
				return false, err
			}
			continue
		}
		log, err := accessLogger(logdata.AccessLogType_DownstreamEnd, httpStats(s, config))
		if err != nil {
			return false, err
		}
		m.AccessLog = append(m.AccessLog, log)
	}
	// The filter itself goes by its extension rule.
	return false, nil
}

// translateTCPStats gives the metrics to the chain's tcp_proxy. A chain that ends otherwise (Redis) has no TCP metrics.
func translateTCPStats(s *surroundings, chain *listener.FilterChain) (bool, error) {
	for _, f := range chain.Filters {
		config, err := pluginConfig(f.GetTypedConfig())
		if err != nil {
			return false, err
		}
		if config == nil {
			continue
		}
		log, err := accessLogger(logdata.AccessLogType_TcpConnectionEnd, tcpStats(s, config))
		if err != nil {
			return false, err
		}
		for _, terminal := range chain.Filters {
			proxy := &tcp.TcpProxy{}
			if !terminal.GetTypedConfig().MessageIs(proxy) {
				continue
			}
			if err := terminal.GetTypedConfig().UnmarshalTo(proxy); err != nil {
				return false, err
			}
			proxy.AccessLog = append(proxy.AccessLog, log)
			packed, err := pack(proxy)
			if err != nil {
				return false, err
			}
			terminal.ConfigType = &listener.Filter_TypedConfig{TypedConfig: packed}
		}
	}
	return false, nil
}

// pluginConfig returns the configuration of istio.stats, or nil for another extension.
func pluginConfig(a *anypb.Any) (*stats.PluginConfig, error) {
	config := &stats.PluginConfig{}
	if !a.MessageIs(config) {
		return nil, nil
	}
	if err := a.UnmarshalTo(config); err != nil {
		return nil, fmt.Errorf("unmarshal %s: %w", a.MessageName(), err)
	}
	return config, nil
}

// accessLogger logs at the end of a stream only: with flushes in between, a stream would be counted more than once.
func accessLogger(when logdata.AccessLogType, config *statslog.Config) (*accesslog.AccessLog, error) {
	packed, err := pack(config)
	if err != nil {
		return nil, err
	}
	return &accesslog.AccessLog{
		Name: statsLogger,
		Filter: &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{
			LogTypeFilter: &accesslog.LogTypeFilter{Types: []logdata.AccessLogType{when}},
		}},
		ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed},
	}, nil
}

func httpStats(s *surroundings, config *stats.PluginConfig) *statslog.Config {
	tags := append(commonTags(s, config),
		&statslog.Config_Tag{Name: "request_protocol", ValueFormat: "%REQ(CONTENT-TYPE)%", Rules: protocolOfContentType()},
		tag("response_code", "%RESPONSE_CODE%"),
		tag("grpc_response_status", "%GRPC_STATUS_NUMBER%"),
	)
	b := statsBuilder{config: config, tags: tags}
	b.counter("requests_total", "")
	b.histogram("request_duration_milliseconds", "%DURATION%", statslog.Config_Histogram_Milliseconds)
	b.histogram("request_bytes", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%", statslog.Config_Histogram_Bytes)
	b.histogram("response_bytes", "%DOWNSTREAM_WIRE_BYTES_SENT%", statslog.Config_Histogram_Bytes)
	return b.out()
}

func tcpStats(s *surroundings, config *stats.PluginConfig) *statslog.Config {
	b := statsBuilder{config: config, tags: append(commonTags(s, config), tag("request_protocol", "tcp"))}
	b.counter("tcp_connections_closed_total", "")
	b.counter("tcp_sent_bytes_total", "%DOWNSTREAM_WIRE_BYTES_SENT%")
	b.counter("tcp_received_bytes_total", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%")
	return b.out()
}

// commonTags are the labels of both kinds. What a side knows about itself is text; what it knows about the other side
// comes from the connection's certificates and from the metadata of cluster and endpoint (metadata.go).
func commonTags(s *surroundings, config *stats.PluginConfig) []*statslog.Config_Tag {
	self := func(side string) []*statslog.Config_Tag {
		return []*statslog.Config_Tag{
			text(side+"_workload", s.proxy.Workload),
			text(side+"_workload_namespace", s.proxy.Namespace),
			text(side+"_app", s.proxy.App),
			text(side+"_version", s.proxy.Version),
			text(side+"_canonical_service", s.proxy.CanonicalService),
			text(side+"_canonical_revision", s.proxy.CanonicalRevision),
			text(side+"_cluster", s.proxy.Cluster),
		}
	}
	tags := []*statslog.Config_Tag{}
	if s.inbound {
		tags = append(tags, tag("reporter", "destination"))
		tags = append(tags, self("destination")...)
		// The client does not introduce itself yet beyond its certificate.
		for _, label := range []string{"workload", "workload_namespace", "app", "version", "canonical_service", "cluster"} {
			tags = append(tags, tag("source_"+label, unknown))
		}
		tags = append(tags,
			tag("source_canonical_revision", "latest"),
			tag("source_principal", "%DOWNSTREAM_PEER_URI_SAN%"),
			tag("destination_principal", "%DOWNSTREAM_LOCAL_URI_SAN%"),
			tag("destination_service", clusterMetadata(serviceHost)),
			tag("destination_service_name", clusterMetadata(serviceName)),
			text("destination_service_namespace", s.proxy.Namespace),
			&statslog.Config_Tag{Name: "connection_security_policy", ValueFormat: "%DOWNSTREAM_PEER_URI_SAN%", Rules: securityOfPeer()},
		)
	} else {
		reporter := "source"
		if config.Reporter == stats.Reporter_SERVER_GATEWAY {
			reporter = "waypoint"
		}
		host := clusterMetadata(serviceHost)
		tags = append(tags, tag("reporter", reporter))
		tags = append(tags, self("source")...)
		tags = append(tags,
			tag("source_principal", "%UPSTREAM_LOCAL_URI_SAN%"),
			tag("destination_principal", "%UPSTREAM_PEER_URI_SAN%"),
			tag("destination_workload", endpointMetadata(workloadName)),
			tag("destination_workload_namespace", endpointMetadata(workloadNamespace)),
			tag("destination_app", unknown),
			tag("destination_version", unknown),
			tag("destination_canonical_service", endpointMetadata(canonicalService)),
			tag("destination_canonical_revision", endpointMetadata(canonicalRevision)),
			tag("destination_cluster", endpointMetadata(clusterID)),
			tag("destination_service", host),
			tag("destination_service_name", clusterMetadata(serviceName)),
			tag("destination_service_namespace", clusterMetadata(serviceNamespace)),
			tag("connection_security_policy", unknown),
		)
	}
	return append(tags, tag("response_flags", "%RESPONSE_FLAGS%"))
}

func tag(name, format string) *statslog.Config_Tag {
	return &statslog.Config_Tag{Name: name, ValueFormat: format}
}

// text is a tag with a fixed value, which must not be read as a format string.
func text(name, value string) *statslog.Config_Tag {
	if value == "" {
		value = unknown
	}
	return tag(name, strings.ReplaceAll(value, "%", "%%"))
}

// protocolOfContentType is how Istio tells gRPC from other HTTP.
func protocolOfContentType() *matcher.Matcher {
	return tagRules(&matcher.Matcher_MatcherTree{TreeType: &matcher.Matcher_MatcherTree_PrefixMatchMap{
		PrefixMatchMap: &matcher.Matcher_MatcherTree_MatchMap{Map: map[string]*matcher.Matcher_OnMatch{
			"application/grpc":     becomes("grpc"),
			"application/grpc-web": becomes("http"),
		}},
	}}, "http")
}

// securityOfPeer calls a connection mutual_tls when the client has shown an identity.
func securityOfPeer() *matcher.Matcher {
	return tagRules(&matcher.Matcher_MatcherTree{TreeType: &matcher.Matcher_MatcherTree_ExactMatchMap{
		ExactMatchMap: &matcher.Matcher_MatcherTree_MatchMap{Map: map[string]*matcher.Matcher_OnMatch{"": becomes("none")}},
	}}, "mutual_tls")
}

func tagRules(tree *matcher.Matcher_MatcherTree, otherwise string) *matcher.Matcher {
	tree.Input = &xdscore.TypedExtensionConfig{Name: "tag", TypedConfig: mustPack(&taginput.StatTagValueInput{})}
	return &matcher.Matcher{
		MatcherType: &matcher.Matcher_MatcherTree_{MatcherTree: tree},
		OnNoMatch:   becomes(otherwise),
	}
}

func becomes(value string) *matcher.Matcher_OnMatch {
	return &matcher.Matcher_OnMatch{OnMatch: &matcher.Matcher_OnMatch_Action{Action: &xdscore.TypedExtensionConfig{
		Name: "transform",
		TypedConfig: mustPack(&transform.TransformStat{
			UpdateTag: &transform.TransformStat_UpdateTag{NewTagValue: value},
		}),
	}}}
}

// mustPack is for messages made from constants.
func mustPack(m proto.Message) *anypb.Any {
	a, err := pack(m)
	if err != nil {
		panic(err)
	}
	return a
}

// statsBuilder applies what the Telemetry API asks for to each metric: drop it, remove tags, set tags.
type statsBuilder struct {
	config     *stats.PluginConfig
	tags       []*statslog.Config_Tag
	counters   []*statslog.Config_Counter
	histograms []*statslog.Config_Histogram
}

func (b *statsBuilder) out() *statslog.Config {
	return &statslog.Config{
		StatsScope: &envoytype.Scope{SharingName: statsScope},
		Counters:   b.counters,
		Histograms: b.histograms,
	}
}

// counter adds a format's value, or one.
func (b *statsBuilder) counter(name, format string) {
	stat := b.stat(name)
	if stat == nil {
		return
	}
	c := &statslog.Config_Counter{Stat: stat, ValueFormat: format}
	if format == "" {
		c.ValueFixed = wrapperspb.UInt64(1)
	}
	b.counters = append(b.counters, c)
}

func (b *statsBuilder) histogram(name, format string, unit statslog.Config_Histogram_Unit) {
	if stat := b.stat(name); stat != nil {
		b.histograms = append(b.histograms, &statslog.Config_Histogram{Stat: stat, ValueFormat: format, Unit: unit})
	}
}

// stat returns nil for a metric that is dropped.
func (b *statsBuilder) stat(name string) *statslog.Config_Stat {
	tags := slices.Clone(b.tags)
	for _, override := range b.config.Metrics {
		if override.Name != "" && override.Name != name {
			continue
		}
		if override.Drop {
			return nil
		}
		tags = slices.DeleteFunc(tags, func(t *statslog.Config_Tag) bool {
			_, set := override.Dimensions[t.Name]
			return slices.Contains(override.TagsToRemove, t.Name) || set
		})
		for _, label := range sortedKeys(override.Dimensions) {
			tags = append(tags, tag(label, formatOfExpression(override.Dimensions[label])))
		}
	}
	return &statslog.Config_Stat{Name: "istio_" + name, Tags: tags}
}
