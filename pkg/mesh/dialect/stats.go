package dialect

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	logdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	otellog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	statslog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	transform "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/actions/transform_stat/v3"
	taginput "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/stats/v3"
	matchers "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	lru "github.com/hashicorp/golang-lru/v2"
	otlp "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"istio.io/api/envoy/extensions/stats"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// This file converts istio.stats into access loggers. For HTTP it uses envoy.access_loggers.stats: a counter or histogram
// for each of Istio's metrics, with a few tags from format strings, which pkg/mesh/exposition expands into Istio's
// labels. For TCP it uses one envoy.access_loggers.open_telemetry, whose entries the agent counts: each entry holds the
// bytes since the start of the connection, so a counter needs the previous entry. Names and values are those of Envoy's
// contrib/istio/filters/http/istio_stats.

const (
	statsLogger = "envoy.access_loggers.stats"
	// connectionsLogger is identified by its type; every listener has it, so its name is short.
	connectionsLogger = "istio.tcp"
	unknown           = "unknown"

	// agentCluster is the cluster of the agent in Istio's bootstrap (build/images sets its address to exposition.Socket).
	agentCluster = "prometheus_stats"
	// agentTimeout is how long Envoy waits for the local agent.
	agentTimeout = 5 * time.Second
	// reportingInterval is how often the bytes of an open TCP connection are counted, unless the Telemetry API sets another interval
	// (istio.io/api/envoy/extensions/stats, tcp_reporting_duration).
	reportingInterval = 15 * time.Second

	// ownTags is the prefix of all tags that the agent expands into labels (pkg/mesh/exposition).
	ownTags = "polymesh_"

	// statsPlugin is the type of istio.stats.
	statsPlugin = "stats.PluginConfig"
)

// Scopes are shared by all loggers of a proxy, so that each statistic exists once.
var (
	statsScope = &envoytype.Scope{SharingName: "istio"}
	// messagesScope limits growth: streams with different numbers of messages each create a statistic.
	messagesScope = &envoytype.Scope{SharingName: "istio_messages", MaxCounters: wrapperspb.UInt32(2000)}
)

// noteDirection records which side of a request the listener is on.
func noteDirection(s *surroundings, listener []byte) ([]byte, bool, error) {
	s.inbound = varint(listener, listenerTrafficDirection) == uint64(core.TrafficDirection_INBOUND)
	return listener, false, nil
}

// parts are the encoded messages that the dialect adds to resources.
type parts struct {
	// loggers are the most recent ones: all ports of a workload share them.
	loggers *lru.Cache[loggersKey, *loggers]
	// exclusions are filters that keep existing loggers from logging the added entries.
	exclusions map[addedEntries][]byte
	// peerFilters or callerFilters go into each HTTP connection manager.
	peerFilters, callerFilters []byte
	// oneIdentity goes into each filter chain.
	oneIdentity []byte
}

type loggersKey struct {
	config       string
	tcp, inbound bool
}

// loggers replace istio.stats.
type loggers struct {
	// logs are the encoded loggers.
	logs [][]byte
	// interval is how often the TCP loggers log an open connection, an encoded Duration.
	interval []byte
}

// loggersSize is more than the number of different metrics settings in a mesh, even while it changes.
const loggersSize = 64

func newParts() *parts {
	cache, err := lru.New[loggersKey, *loggers](loggersSize)
	if err != nil {
		panic(err) // only for a size below one
	}
	exclusions := map[addedEntries][]byte{}
	for _, added := range []addedEntries{{connected: true}, {periodic: true}, {true, true}} {
		exclusions[added] = mustPack(&accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{
			LogTypeFilter: &accesslog.LogTypeFilter{Types: added.types(), Exclude: true},
		}}).Value
	}
	return &parts{cache, exclusions, peerFilters(false), peerFilters(true), oneIdentityFilter()}
}

// loggersFor returns the loggers for a filter's encoded Any, or nil if the filter is not istio.stats. The result is shared and
// must not be changed.
func (s *surroundings) loggersFor(config []byte, tcp bool) (*loggers, error) {
	url := valueAt(config, anyTypeURL)
	if !bytes.HasSuffix(url, []byte(statsPlugin)) && !bytes.HasSuffix(url, []byte("TypedStruct")) {
		return nil, nil
	}
	key := loggersKey{string(config), tcp, s.inbound}
	if known, ok := s.parts.loggers.Get(key); ok {
		return known, nil
	}
	made, err := s.build(&anypb.Any{TypeUrl: string(url), Value: valueAt(config, anyValue)}, tcp)
	if made != nil {
		s.parts.loggers.Add(key, made)
	}
	return made, err
}

// build returns the loggers for a configuration of istio.stats, and nil for another extension.
func (s *surroundings) build(a *anypb.Any, tcp bool) (*loggers, error) {
	config, err := readStats(a)
	if err != nil || config == nil {
		return nil, err
	}
	build := httpStats
	if tcp {
		build = tcpStats
	}
	logs, err := build(s, config)
	if err != nil {
		return nil, err
	}
	interval := reportingInterval
	if every := config.TcpReportingDuration.AsDuration(); every >= time.Millisecond {
		interval = every
	}
	encoded, err := pack(durationpb.New(interval))
	if err != nil {
		return nil, err
	}
	made := &loggers{interval: encoded.Value}
	for _, log := range logs {
		packed, err := pack(log)
		if err != nil {
			return nil, err
		}
		made.logs = append(made.logs, packed.Value)
	}
	return made, nil
}

// readStats reads the configuration of istio.stats, which an EnvoyFilter may also write as a TypedStruct. It returns nil for
// another extension.
func readStats(a *anypb.Any) (*stats.PluginConfig, error) {
	if effectiveType(a) != statsPlugin {
		return nil, nil
	}
	if a.MessageName() != statsPlugin {
		var err error
		if a, err = unstructured(a, func() protoreflect.Message { return (&stats.PluginConfig{}).ProtoReflect() }); err != nil {
			return nil, err
		}
	}
	config := &stats.PluginConfig{}
	if err := a.UnmarshalTo(config); err != nil {
		return nil, fmt.Errorf("unmarshal %s: %w", a.MessageName(), err)
	}
	return config, nil
}

// noteTCPStats sets the loggers for a chain's tcp_proxy. A chain with another terminal filter (Redis) has no TCP metrics.
func noteTCPStats(s *surroundings, chain []byte) ([]byte, bool, error) {
	s.tcp = nil
	for filter := range valuesOf(chain, chainFilters) {
		made, err := s.loggersFor(valueAt(filter, filterTypedConfig), true)
		if err != nil {
			return nil, false, err
		}
		if made != nil && len(made.logs) > 0 {
			s.tcp = made
		}
	}
	return chain, false, nil
}

// addedEntries are the log entries that a tcp_proxy writes only because the dialect asks for them, besides the one at the end of
// the connection: when the upstream is connected, and periodically.
type addedEntries struct{ connected, periodic bool }

func addedTo(proxy []byte) addedEntries {
	options := valueAt(proxy, tcpOptions)
	_, periodic := lastValue(options, tcpOptionsInterval)
	return addedEntries{connected: varint(options, tcpOptionsOnConnected) == 0, periodic: !periodic}
}

func (a addedEntries) types() (types []logdata.AccessLogType) {
	if a.connected {
		types = append(types, logdata.AccessLogType_TcpUpstreamConnected)
	}
	if a.periodic {
		types = append(types, logdata.AccessLogType_TcpPeriodic)
	}
	return types
}

// noteTCPLogs sets the exclusion for the existing loggers, because with metrics a tcp_proxy writes more entries than before.
func noteTCPLogs(s *surroundings, proxy []byte) ([]byte, bool, error) {
	s.exclusion = nil
	if s.tcp != nil {
		s.exclusion = s.parts.exclusions[addedTo(proxy)]
	}
	return proxy, false, nil
}

// excludeFiltered adds the exclusion to a logger that already has a filter.
func excludeFiltered(s *surroundings, log []byte) ([]byte, bool, error) {
	filter, filtered := lastValue(log, accessLogFilter)
	if len(s.exclusion) == 0 || !filtered {
		return log, false, nil
	}
	both := appendBytes(nil, andFilter, appendBytes(appendBytes(nil, andFilters, filter), andFilters, s.exclusion))
	e := edits{in: log}
	for f := range fields(log, 0, len(log)) {
		if f.number == accessLogFilter {
			e.change(f.start, f.to-f.start, nil)
		}
	}
	e.change(len(log), 0, appendBytes(nil, accessLogFilter, both))
	out, _ := e.out()
	s.exclusion = nil // already applied when the replacement is walked
	return out, true, nil
}

// excludeUnfiltered adds the exclusion to a logger without a filter.
func excludeUnfiltered(s *surroundings, e *edits, from, to int) error {
	if len(s.exclusion) > 0 {
		e.change(to, 0, appendBytes(nil, accessLogFilter, s.exclusion))
	}
	return nil
}

// addTCPLogs adds the metrics loggers to a tcp_proxy. A server's proxy then connects to the app after the TLS handshake instead
// of in parallel, because only then the caller is known.
func addTCPLogs(s *surroundings, e *edits, from, to int) error {
	if s.tcp == nil {
		return nil
	}
	proxy := e.in[from:to]
	begin := len(e.scratch)
	b := e.scratch
	added := addedTo(proxy)
	var options []byte // merged with what is there
	if added.connected {
		options = appendVarint(options, tcpOptionsOnConnected, 1)
	}
	if added.periodic {
		options = appendBytes(options, tcpOptionsInterval, s.tcp.interval)
	}
	if len(options) > 0 {
		b = appendBytes(b, tcpOptions, options)
	}
	if s.inbound && varint(proxy, tcpConnectMode) == uint64(tcp.UpstreamConnectMode_IMMEDIATE) {
		b = appendVarint(b, tcpConnectMode, uint64(tcp.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE))
		if _, ok := lastValue(proxy, tcpMaxEarlyData); !ok { // required by the mode
			b = appendBytes(b, tcpMaxEarlyData, nil)
		}
	}
	for _, log := range s.tcp.logs {
		b = appendBytes(b, tcpAccessLog, log)
	}
	e.scratch = b
	e.change(to, 0, b[begin:len(b):len(b)])
	return nil
}

// allOf passes entries that all filters pass.
func allOf(filters ...*accesslog.AccessLogFilter) *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_AndFilter{AndFilter: &accesslog.AndFilter{Filters: filters}}}
}

// onlyLogType passes entries of one type only: with periodic flushes, a stream would be counted more than once.
func onlyLogType(kind logdata.AccessLogType) *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{
		LogTypeFilter: &accesslog.LogTypeFilter{Types: []logdata.AccessLogType{kind}},
	}}
}

// isGRPC passes requests with a gRPC content type.
func isGRPC() *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_HeaderFilter{HeaderFilter: &accesslog.HeaderFilter{
		Header: &route.HeaderMatcher{Name: "content-type", HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{
			StringMatch: &matchers.StringMatcher{MatchPattern: &matchers.StringMatcher_Prefix{Prefix: "application/grpc"}},
		}},
	}}}
}

func httpStats(s *surroundings, config *stats.PluginConfig) ([]*accesslog.AccessLog, error) {
	tags := append(commonTags(s, config),
		&statslog.Config_Tag{Name: "request_protocol", ValueFormat: "%REQ(CONTENT-TYPE)%", Rules: protocolOfContentType()},
		newTag("response_code", "%RESPONSE_CODE%"),
		newTag("grpc_response_status", "%GRPC_STATUS_NUMBER%"),
	)
	end := onlyLogType(logdata.AccessLogType_DownstreamEnd)
	b := statsBuilder{surroundings: s, config: config, folded: exposition.HTTP, tags: tags}
	b.counter("requests_total", "")
	b.histogram("request_duration_milliseconds", "%DURATION%", statslog.Config_Histogram_Milliseconds)
	b.histogram("request_bytes", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%", statslog.Config_Histogram_Bytes)
	b.histogram("response_bytes", "%DOWNSTREAM_WIRE_BYTES_SENT%", statslog.Config_Histogram_Bytes)
	b.log(statsScope, end)

	// Each different pair of numbers creates its own statistic, so their number is limited.
	b.tags = append(slices.Clone(tags), newTag(exposition.Messages, "%FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)%"))
	b.counter("request_messages_total", "")
	b.counter("response_messages_total", "")
	b.log(messagesScope, allOf(end, isGRPC()))
	return b.logs, b.err
}

// tcpStats returns the logger whose entries exposition.Connections counts.
func tcpStats(s *surroundings, config *stats.PluginConfig) ([]*accesslog.AccessLog, error) {
	b := statsBuilder{surroundings: s, config: config, folded: exposition.TCP, tags: append(commonTags(s, config), newTag("request_protocol", "tcp"))}
	attributes := b.attributes(exposition.TCPMetrics)
	if len(attributes) == 0 {
		return nil, nil // all are disabled
	}
	packed, err := pack(&otellog.OpenTelemetryAccessLogConfig{
		HttpService: &core.HttpService{HttpUri: &core.HttpUri{
			Uri:              "http://agent" + exposition.ConnectionsPath,
			HttpUpstreamType: &core.HttpUri_Cluster{Cluster: agentCluster},
			Timeout:          durationpb.New(agentTimeout),
		}},
		DisableBuiltinLabels: true,
		Body:                 textValue(exposition.Entry),
		Attributes:           &otlp.KeyValueList{Values: attributes},
	})
	if err != nil {
		return nil, err
	}
	return []*accesslog.AccessLog{{Name: connectionsLogger, ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed}}}, nil
}

// attributes returns the tags of metrics as exposition.Connections reads them: one list if all metrics have the same tags or,
// where the Telemetry API makes them differ, a list for each metric.
func (b *statsBuilder) attributes(metrics []string) []*otlp.KeyValue {
	var each [][]*otlp.KeyValue
	var lists []*otlp.KeyValue
	for _, name := range metrics {
		stat := b.stat(strings.TrimPrefix(name, "istio_"))
		if stat == nil {
			continue
		}
		var tags []*otlp.KeyValue
		for _, t := range stat.Tags {
			tags = append(tags, &otlp.KeyValue{Key: t.Name, Value: textValue(t.ValueFormat)})
		}
		each = append(each, tags)
		lists = append(lists, &otlp.KeyValue{Key: name, Value: &otlp.AnyValue{
			Value: &otlp.AnyValue_KvlistValue{KvlistValue: &otlp.KeyValueList{Values: tags}},
		}})
	}
	same := func(tags []*otlp.KeyValue) bool {
		return slices.EqualFunc(tags, each[0], func(a, b *otlp.KeyValue) bool { return proto.Equal(a, b) })
	}
	if len(each) == len(metrics) && !slices.ContainsFunc(each, func(tags []*otlp.KeyValue) bool { return !same(tags) }) {
		return each[0]
	}
	return lists
}

func textValue(text string) *otlp.AnyValue {
	return &otlp.AnyValue{Value: &otlp.AnyValue_StringValue{StringValue: text}}
}

// commonTags are the tags of both kinds. A server identifies the peer by its certificate, a client by the endpoint's
// metadata from istiod; the proxy's own workload is known to its agent. pkg/mesh/exposition expands them into labels.
func commonTags(s *surroundings, config *stats.PluginConfig) []*statslog.Config_Tag {
	tags := []*statslog.Config_Tag{
		newTag(exposition.Service, clusterMetadata(serviceKey)),
		newTag("response_flags", "%RESPONSE_FLAGS%"),
	}
	if s.inbound {
		return append(tags,
			newTag(exposition.Reporter, "destination"),
			newTag(exposition.Peer, "%DOWNSTREAM_PEER_OTHERNAME_SAN%"),
			newTag(exposition.SourcePrincipal, "%DOWNSTREAM_PEER_URI_SAN%"),
			newTag(exposition.DestinationPrincipal, "%DOWNSTREAM_LOCAL_URI_SAN%"),
		)
	}
	reporter := "source"
	if config.Reporter == stats.Reporter_SERVER_GATEWAY {
		reporter = "waypoint"
	}
	return append(tags,
		newTag(exposition.Reporter, reporter),
		newTag(exposition.Peer, endpointMetadata(istioMetadata, workloadKey)),
		newTag(exposition.PeerLabels, endpointMetadata(ownMetadata, labelsKey)),
		newTag(exposition.SourcePrincipal, "%UPSTREAM_LOCAL_URI_SAN%"),
		newTag(exposition.DestinationPrincipal, "%UPSTREAM_PEER_URI_SAN%"),
	)
}

func newTag(name, format string) *statslog.Config_Tag {
	return &statslog.Config_Tag{Name: name, ValueFormat: format}
}

// literal escapes text for use in a format string.
func literal(text string) string { return strings.ReplaceAll(text, "%", "%%") }

// protocolOfContentType distinguishes gRPC from other HTTP as Istio does.
func protocolOfContentType() *matcher.Matcher {
	return tagRules(&matcher.Matcher_MatcherTree{TreeType: &matcher.Matcher_MatcherTree_PrefixMatchMap{
		PrefixMatchMap: &matcher.Matcher_MatcherTree_MatchMap{Map: map[string]*matcher.Matcher_OnMatch{
			"application/grpc":     becomes("grpc"),
			"application/grpc-web": becomes("http"),
		}},
	}}, "http")
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

// mustPack is only for messages built from constants.
func mustPack(m proto.Message) *anypb.Any {
	a, err := pack(m)
	if err != nil {
		panic(err)
	}
	return a
}

// statsBuilder applies the overrides of the Telemetry API to each metric: drop it, remove tags, set tags. It collects metrics
// for one logger at a time.
type statsBuilder struct {
	surroundings *surroundings
	config       *stats.PluginConfig
	folded       string // the tag that most others are folded into
	tags         []*statslog.Config_Tag
	counters     []*statslog.Config_Counter
	histograms   []*statslog.Config_Histogram
	logs         []*accesslog.AccessLog
	err          error
}

// log builds a logger from the collected metrics, for entries that pass the filter, unless all metrics are disabled.
func (b *statsBuilder) log(scope *envoytype.Scope, filter *accesslog.AccessLogFilter) {
	config := &statslog.Config{StatsScope: scope, Counters: b.counters, Histograms: b.histograms}
	b.counters, b.histograms = nil, nil
	if len(config.Counters) == 0 && len(config.Histograms) == 0 || b.err != nil {
		return
	}
	var packed *anypb.Any
	if packed, b.err = pack(config); b.err == nil {
		b.logs = append(b.logs, &accesslog.AccessLog{
			Name: statsLogger, Filter: filter, ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: packed},
		})
	}
}

// counter adds a counter that grows by the format's value, or by one if the format is empty.
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
	var without []string
	set := map[string]bool{}
	for _, override := range b.config.Metrics {
		if override.Name != "" && override.Name != name {
			continue
		}
		if override.Drop {
			return nil
		}
		for _, label := range override.TagsToRemove {
			without = append(without, label)
			delete(set, label)
		}
		for _, label := range slices.Sorted(maps.Keys(override.Dimensions)) {
			if strings.HasPrefix(label, ownTags) {
				continue // it would override the peer that istiod has set
			}
			without = slices.DeleteFunc(without, func(l string) bool { return l == label })
			tags = slices.DeleteFunc(tags, func(t *statslog.Config_Tag) bool { return t.Name == label })
			tags = append(tags, newTag(label, formatOfExpression(b.surroundings, override.Dimensions[label])))
			set[label] = true
		}
	}
	return &statslog.Config_Stat{Name: "istio_" + name, Tags: fold(b.folded, withoutLabels(tags, without), set)}
}

// fold joins tags into one (exposition.Folded), except those with rules and those set by the user, which may hold
// any text.
func fold(name string, tags []*statslog.Config_Tag, set map[string]bool) []*statslog.Config_Tag {
	names := exposition.Folded[name]
	formats := make([]string, len(names))
	rest := slices.DeleteFunc(tags, func(t *statslog.Config_Tag) bool {
		i := slices.Index(names, t.Name)
		if i < 0 || t.Rules != nil || set[t.Name] {
			return false
		}
		formats[i] = t.ValueFormat
		return true
	})
	return append([]*statslog.Config_Tag{newTag(name, strings.Join(formats, exposition.FoldedBy))}, rest...)
}

// withoutLabels removes labels: tags that hold nothing else, and tags of which no label is left. The agent drops the label
// from the other tags.
func withoutLabels(tags []*statslog.Config_Tag, labels []string) []*statslog.Config_Tag {
	gone := func(label string) bool { return slices.Contains(labels, label) }
	side := func(prefix string) bool {
		for _, label := range workload.Labels {
			if !gone(prefix + label) {
				return false
			}
		}
		return true
	}
	inbound := slices.ContainsFunc(tags, func(t *statslog.Config_Tag) bool {
		return t.Name == exposition.Reporter && t.ValueFormat == "destination"
	})
	tags = slices.DeleteFunc(tags, func(t *statslog.Config_Tag) bool {
		switch t.Name {
		case exposition.Reporter, exposition.Messages:
			return false // needed to derive other labels
		case exposition.Peer, exposition.PeerLabels:
			return inbound && side("source_") || !inbound && side("destination_")
		case exposition.Service:
			return gone(exposition.DestinationService) && gone(exposition.DestinationServiceName) && gone(exposition.DestinationNamespace)
		case exposition.SourcePrincipal:
			return gone(t.Name) && (!inbound || gone(exposition.ConnectionSecurityPolicy))
		}
		return gone(t.Name)
	})
	if len(labels) == 0 {
		return tags
	}
	slices.Sort(labels)
	return append(tags, &statslog.Config_Tag{Name: exposition.Without, ValueFormat: literal(strings.Join(slices.Compact(labels), ","))})
}
