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

// This file turns istio.stats into access loggers. For HTTP they are envoy.access_loggers.stats: a counter or histogram for
// each of Istio's metrics, with few tags from format strings, of which pkg/mesh/exposition makes Istio's labels. For TCP it is
// one envoy.access_loggers.open_telemetry, whose entries the agent counts: such an entry says how many bytes there were since the
// connection's beginning, of which only someone who remembers the last one can make a counter. Names and values are those of
// Envoy's contrib/istio/filters/http/istio_stats.

const (
	statsLogger = "envoy.access_loggers.stats"
	// connectionsLogger is found by its type; each listener has it, so its name is short.
	connectionsLogger = "istio.tcp"
	unknown           = "unknown"

	// agentCluster is the cluster in Istio's bootstrap behind which the agent is (build/images puts exposition.Socket into it).
	agentCluster = "prometheus_stats"
	// agentTimeout is how long Envoy waits for the agent beside it.
	agentTimeout = 5 * time.Second
	// reportingInterval is how often the bytes of an open TCP connection are counted, unless the Telemetry API says otherwise
	// (istio.io/api/envoy/extensions/stats, tcp_reporting_duration).
	reportingInterval = 15 * time.Second

	// ownTags begins the names of all tags that the agent makes labels of (pkg/mesh/exposition).
	ownTags = "polymesh_"

	// statsPlugin is the type of istio.stats.
	statsPlugin = "stats.PluginConfig"
)

// Scopes are shared by all loggers of a proxy, so that one statistic is one statistic.
var (
	statsScope = &envoytype.Scope{SharingName: "istio"}
	// messagesScope ends the growth where streams have ever different numbers of messages.
	messagesScope = &envoytype.Scope{SharingName: "istio_messages", MaxCounters: wrapperspb.UInt32(2000)}
)

// noteDirection tells the rules below which side of a request the listener is on.
func noteDirection(s *surroundings, listener []byte) ([]byte, bool, error) {
	s.inbound = varint(listener, listenerTrafficDirection) == uint64(core.TrafficDirection_INBOUND)
	return listener, false, nil
}

// parts are what the dialect puts into resources, encoded.
type parts struct {
	// loggers are those made last: all ports of a workload have the same ones.
	loggers *lru.Cache[loggersKey, *loggers]
	// quiet are filters for loggers that must not have the entries that were added.
	quiet map[addedEntries][]byte
	// peerFilters go into an HTTP connection manager, or callerFilters.
	peerFilters, callerFilters []byte
	// oneIdentity goes into a filter chain.
	oneIdentity []byte
}

type loggersKey struct {
	config       string
	tcp, inbound bool
}

// loggers are what takes the place of istio.stats.
type loggers struct {
	// logs are the loggers, encoded.
	logs [][]byte
	// interval, a Duration, encoded, is how often those for TCP log an open connection.
	interval []byte
}

// loggersSize is more than there are settings of metrics in a mesh that changes.
const loggersSize = 64

func newParts() *parts {
	cache, err := lru.New[loggersKey, *loggers](loggersSize)
	if err != nil {
		panic(err) // a size below one
	}
	quiet := map[addedEntries][]byte{}
	for _, added := range []addedEntries{{connected: true}, {periodic: true}, {true, true}} {
		quiet[added] = mustPack(&accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{
			LogTypeFilter: &accesslog.LogTypeFilter{Types: added.types(), Exclude: true},
		}}).Value
	}
	return &parts{cache, quiet, peerFilters(false), peerFilters(true), oneIdentityFilter()}
}

// loggersFor returns the loggers for the filter config, an Any, encoded, or nil if that is not istio.stats. No one may change
// them.
func (s *surroundings) loggersFor(config []byte, tcp bool) (*loggers, error) {
	url := at(config, anyTypeURL)
	if !bytes.HasSuffix(url, []byte(statsPlugin)) && !bytes.HasSuffix(url, []byte("TypedStruct")) {
		return nil, nil
	}
	key := loggersKey{string(config), tcp, s.inbound}
	if known, ok := s.parts.loggers.Get(key); ok {
		return known, nil
	}
	made, err := s.build(&anypb.Any{TypeUrl: string(url), Value: at(config, anyValue)}, tcp)
	if made != nil {
		s.parts.loggers.Add(key, made)
	}
	return made, err
}

// build makes the loggers for a configuration of istio.stats, and nil for that of another extension.
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

// readStats reads the configuration of istio.stats, which an EnvoyFilter may also write as a TypedStruct; it is nil for
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

// noteTCPStats reads the loggers for a chain's tcp_proxy. A chain that ends otherwise (Redis) has no TCP metrics.
func noteTCPStats(s *surroundings, chain []byte) ([]byte, bool, error) {
	s.tcp = nil
	for filter := range each(chain, chainFilters) {
		made, err := s.loggersFor(at(filter, filterTypedConfig), true)
		if err != nil {
			return nil, false, err
		}
		if made != nil && len(made.logs) > 0 {
			s.tcp = made
		}
	}
	return chain, false, nil
}

// addedEntries are those, beside the one at a connection's end, that a tcp_proxy makes only because the dialect asks for them:
// when it has its upstream, and every now and then.
type addedEntries struct{ connected, periodic bool }

func addedTo(proxy []byte) addedEntries {
	options := at(proxy, tcpOptions)
	_, periodic := last(options, tcpOptionsInterval)
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

// noteTCPLogs: with the metrics a tcp_proxy logs more than before. Loggers that are there keep quiet then.
func noteTCPLogs(s *surroundings, proxy []byte) ([]byte, bool, error) {
	s.quiet = nil
	if s.tcp != nil {
		s.quiet = s.parts.quiet[addedTo(proxy)]
	}
	return proxy, false, nil
}

// quietFiltered makes a logger quiet that has a filter.
func quietFiltered(s *surroundings, log []byte) ([]byte, bool, error) {
	filter, filtered := last(log, accessLogFilter)
	if len(s.quiet) == 0 || !filtered {
		return log, false, nil
	}
	both := appendBytes(nil, andFilter, appendBytes(appendBytes(nil, andFilters, filter), andFilters, s.quiet))
	e := edits{in: log}
	for f := range fields(log, 0, len(log)) {
		if f.number == accessLogFilter {
			e.change(f.start, f.to-f.start, nil)
		}
	}
	e.change(len(log), 0, appendBytes(nil, accessLogFilter, both))
	out, _ := e.out()
	s.quiet = nil // it is, for the walk of what it is now
	return out, true, nil
}

// quietUnfiltered makes a logger quiet that has none.
func quietUnfiltered(s *surroundings, e *edits, from, to int) error {
	if len(s.quiet) > 0 {
		e.change(to, 0, appendBytes(nil, accessLogFilter, s.quiet))
	}
	return nil
}

// addTCPLogs gives the metrics to a tcp_proxy. A server's proxy connects to the app after the TLS handshake, not beside it:
// only then it knows who is calling.
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
		if _, ok := last(proxy, tcpMaxEarlyData); !ok { // the mode asks for it
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

// allOf passes what all of the filters pass.
func allOf(filters ...*accesslog.AccessLogFilter) *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_AndFilter{AndFilter: &accesslog.AndFilter{Filters: filters}}}
}

// when passes entries of one kind only: with flushes in between, a stream would be counted more than once.
func when(kind logdata.AccessLogType) *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_LogTypeFilter{
		LogTypeFilter: &accesslog.LogTypeFilter{Types: []logdata.AccessLogType{kind}},
	}}
}

// isGRPC passes requests with gRPC's content type.
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
		tag("response_code", "%RESPONSE_CODE%"),
		tag("grpc_response_status", "%GRPC_STATUS_NUMBER%"),
	)
	end := when(logdata.AccessLogType_DownstreamEnd)
	b := statsBuilder{surroundings: s, config: config, folded: exposition.HTTP, tags: tags}
	b.counter("requests_total", "")
	b.histogram("request_duration_milliseconds", "%DURATION%", statslog.Config_Histogram_Milliseconds)
	b.histogram("request_bytes", "%DOWNSTREAM_WIRE_BYTES_RECEIVED%", statslog.Config_Histogram_Bytes)
	b.histogram("response_bytes", "%DOWNSTREAM_WIRE_BYTES_SENT%", statslog.Config_Histogram_Bytes)
	b.log(statsScope, end)

	// Each different pair of numbers makes a statistic of its own, so there may be no more than some.
	b.tags = append(slices.Clone(tags), tag(exposition.Messages, "%FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)%"))
	b.counter("request_messages_total", "")
	b.counter("response_messages_total", "")
	b.log(messagesScope, allOf(end, isGRPC()))
	return b.logs, b.err
}

// tcpStats makes the logger whose entries exposition.Connections counts.
func tcpStats(s *surroundings, config *stats.PluginConfig) ([]*accesslog.AccessLog, error) {
	b := statsBuilder{surroundings: s, config: config, folded: exposition.TCP, tags: append(commonTags(s, config), tag("request_protocol", "tcp"))}
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

// attributes are the tags of metrics as exposition.Connections reads them: those of all metrics beside each other or, where
// the Telemetry API makes them differ, those of each metric in a list of their own.
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

// commonTags are the tags of both kinds. Who the other side is comes from its certificate at a server, and at a client
// from what istiod says of the endpoint; whom the proxy itself stands beside, its agent knows. pkg/mesh/exposition makes
// labels of them.
func commonTags(s *surroundings, config *stats.PluginConfig) []*statslog.Config_Tag {
	tags := []*statslog.Config_Tag{
		tag(exposition.Service, clusterMetadata(serviceKey)),
		tag("response_flags", "%RESPONSE_FLAGS%"),
	}
	if s.inbound {
		return append(tags,
			tag(exposition.Reporter, "destination"),
			tag(exposition.Peer, "%DOWNSTREAM_PEER_OTHERNAME_SAN%"),
			tag(exposition.SourcePrincipal, "%DOWNSTREAM_PEER_URI_SAN%"),
			tag(exposition.DestinationPrincipal, "%DOWNSTREAM_LOCAL_URI_SAN%"),
		)
	}
	reporter := "source"
	if config.Reporter == stats.Reporter_SERVER_GATEWAY {
		reporter = "waypoint"
	}
	return append(tags,
		tag(exposition.Reporter, reporter),
		tag(exposition.Peer, endpointMetadata(istioMetadata, workloadKey)),
		tag(exposition.PeerLabels, endpointMetadata(ownMetadata, labelsKey)),
		tag(exposition.SourcePrincipal, "%UPSTREAM_LOCAL_URI_SAN%"),
		tag(exposition.DestinationPrincipal, "%UPSTREAM_PEER_URI_SAN%"),
	)
}

func tag(name, format string) *statslog.Config_Tag {
	return &statslog.Config_Tag{Name: name, ValueFormat: format}
}

// literal is a format string for a text that must not be read as one.
func literal(text string) string { return strings.ReplaceAll(text, "%", "%%") }

// protocolOfContentType is how Istio tells gRPC from other HTTP.
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

// mustPack is for messages made from constants.
func mustPack(m proto.Message) *anypb.Any {
	a, err := pack(m)
	if err != nil {
		panic(err)
	}
	return a
}

// statsBuilder applies what the Telemetry API asks for to each metric: drop it, remove tags, set tags. It gathers metrics
// for one logger after the other.
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

// log makes a logger of the metrics that were gathered, unless all are disabled, for log entries that pass the filter.
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
				continue // it would say who the other side is, in the place of istiod
			}
			without = slices.DeleteFunc(without, func(l string) bool { return l == label })
			tags = slices.DeleteFunc(tags, func(t *statslog.Config_Tag) bool { return t.Name == label })
			tags = append(tags, tag(label, formatOfExpression(b.surroundings, override.Dimensions[label])))
			set[label] = true
		}
	}
	return &statslog.Config_Stat{Name: "istio_" + name, Tags: fold(b.folded, withoutLabels(tags, without), set)}
}

// fold puts tags into one (exposition.Folded), but those with rules, and those that someone else has set to what may hold
// anything.
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
	return append([]*statslog.Config_Tag{tag(name, strings.Join(formats, exposition.FoldedBy))}, rest...)
}

// withoutLabels takes labels away: the tags that are nothing else, and the tags of which no label is left. Of the others
// the agent leaves the label out.
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
			return false // needed to make the others of
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
