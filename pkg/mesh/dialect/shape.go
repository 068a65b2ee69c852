package dialect

import (
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

const (
	anyName      protoreflect.FullName = "google.protobuf.Any"
	metadataName protoreflect.FullName = "envoy.config.core.v3.Metadata"
)

// shape is what the walk needs to know about a message type.
type shape struct {
	name protoreflect.FullName
	// new returns an empty message.
	new func() protoreflect.Message
	// rule changes messages of this type that contain the marker; wire works on the wire format.
	rule   messageRule
	marker []byte
	wire   wireRule
	// members are the fields that can hold an Any or a message with a rule, by number.
	members []*member
	// optional reports whether an unsupported extension may be left out, by Envoy's contract or because of the position's purpose.
	// Everything else may enforce security (RBAC, authentication, TLS), so it is refused.
	optional func(holder []byte) bool
}

// member is a message field. Without a shape it holds an Any.
type member struct {
	name  string
	index int
	many  bool
	isMap bool
	shape *shape
}

func (s *shape) member(n protowire.Number) *member {
	if int(n) < len(s.members) {
		return s.members[n]
	}
	return nil
}

// shapes holds each shape once, by message name.
type shapes map[protoreflect.FullName]*shape

func (all shapes) add(d protoreflect.MessageDescriptor) *shape {
	if s, ok := all[d.FullName()]; ok {
		return s
	}
	s := &shape{
		name: d.FullName(), rule: messageRules[d.FullName()], wire: wireRules[d.FullName()],
		marker: []byte(markers[d.FullName()]), optional: optional(d),
	}
	all[d.FullName()] = s
	if t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName()); err == nil {
		s.new = t.New
	}
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		// Typed metadata is plain data for its readers: Envoy ignores types that it does not know.
		if f.Message() == nil || d.FullName() == metadataName && f.Name() == "typed_filter_metadata" {
			continue
		}
		m := &member{name: string(f.Name()), index: i, many: f.IsList() || f.IsMap(), isMap: f.IsMap()}
		held := f.Message()
		if f.IsMap() {
			if held = f.MapValue().Message(); held == nil {
				continue
			}
		}
		if held.FullName() != anyName {
			m.shape = all.add(held)
		}
		if n := int(f.Number()); n >= len(s.members) {
			s.members = append(s.members, make([]*member, n+1-len(s.members))...)
		}
		s.members[f.Number()] = m
	}
	return s
}

// prune keeps only the members that lead to an Any or to a rule.
func (all shapes) prune() {
	needed := map[*shape]bool{nil: true} // an Any
	for grown := true; grown; {
		grown = false
		for _, s := range all {
			if needed[s] {
				continue
			}
			n := s.ruled()
			for _, m := range s.members {
				n = n || m != nil && needed[m.shape]
			}
			needed[s], grown = n, grown || n
		}
	}
	for _, s := range all {
		for i, m := range s.members {
			if m != nil && !needed[m.shape] {
				s.members[i] = nil
			}
		}
	}
}

// empty reports whether the walk has nothing to do in such a message.
func (s *shape) empty() bool {
	for _, m := range s.members {
		if m != nil {
			return false
		}
	}
	return !s.ruled()
}

func (s *shape) ruled() bool { return s.rule != nil || s.wire.enter != nil || s.wire.leave != nil }

func optional(d protoreflect.MessageDescriptor) func([]byte) bool {
	is := func(m proto.Message) bool { return m.ProtoReflect().Descriptor().FullName() == d.FullName() }
	switch {
	case is(&hcm.HttpFilter{}), // Envoy's API: "clients that do not support this filter may ignore the filter"
		is(&route.FilterConfig{}):
		number := d.Fields().ByName("is_optional").Number()
		return func(holder []byte) bool { return varint(holder, number) != 0 }
	case is(&accesslog.AccessLog{}):
		return func([]byte) bool { return true } // only observes
	}
	return func([]byte) bool { return false }
}
