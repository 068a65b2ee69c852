package dialect

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// verdict is what becomes of an extension.
type verdict int

const (
	keep verdict = iota
	// remove takes the message that holds the extension (an HttpFilter, an AccessLog …) out of its list or map.
	remove
	// refuse gives up on the resource: see Translator.Resource.
	refuse
)

// walker translates one resource. It visits every google.protobuf.Any in it, also those inside others, so that no extension
// position has to be known by name. It reads the wire format and skips what cannot hold an Any; only what changes is written
// anew.
type walker struct {
	*Translator
	around surroundings
	// unknown lists the types that neither Envoy nor a rule knows.
	unknown []string
	// path is where the walker is, for error texts.
	path []string
}

// message walks a message and returns what it becomes, whether that is something else, and what its own extension means for
// it.
func (w *walker) message(s *shape, b []byte) (out []byte, changed bool, v verdict, err error) {
	b, changed, err = w.apply(s, b)
	if err != nil {
		return nil, false, refuse, w.errorf("%w", err)
	}
	out, more, v, err := w.members(s, b)
	return out, changed || more, v, err
}

// apply runs the rule for messages of this type.
func (w *walker) apply(s *shape, b []byte) ([]byte, bool, error) {
	if s.wire != nil {
		return s.wire(&w.around, b)
	}
	if s.rule == nil || !bytes.Contains(b, s.marker) {
		return b, false, nil
	}
	m := s.new().Interface()
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, false, fmt.Errorf("unmarshal %s: %w", s.name, err)
	}
	if changed, err := s.rule(&w.around, m); err != nil || !changed {
		return b, false, err
	}
	packed, err := pack(m)
	return packed.GetValue(), true, err
}

func (w *walker) members(s *shape, b []byte) (out []byte, changed bool, v verdict, err error) {
	done, at := 0, 0 // what is in out, and what was read
	var met [2]uint64
	for at < len(b) {
		num, typ, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			return nil, false, refuse, w.errorf("unmarshal %s: %w", s.name, protowire.ParseError(n))
		}
		size := protowire.ConsumeFieldValue(num, typ, b[at+n:])
		if size < 0 {
			return nil, false, refuse, w.errorf("unmarshal %s: %w", s.name, protowire.ParseError(size))
		}
		start := at
		at += n + size
		m := s.member(num)
		if m == nil || typ != protowire.BytesType {
			continue
		}
		if !m.many {
			if met[m.index/64]&(1<<(m.index%64)) != 0 {
				// One message in two parts, which no encoder writes: nothing may hide in that.
				return w.merged(s, b)
			}
			met[m.index/64] |= 1 << (m.index % 64)
		}
		was, _ := protowire.ConsumeBytes(b[start+n:])
		w.path = append(w.path, m.name)
		is, c, verdict, err := w.member(s, m, b, was)
		w.path = w.path[:len(w.path)-1]
		switch {
		case err != nil:
			return nil, false, refuse, err
		case verdict == remove && !m.many && m.shape == nil:
			// The extension of this message: the message goes with it.
			v, changed = remove, true
			continue
		case verdict == remove && !m.many:
			// One and only: nothing says that the message is valid or safe without it.
			return nil, false, refuse, w.errorf("%s cannot be left out of %s", m.name, s.name)
		case verdict == keep && !c:
			continue
		}
		if out == nil {
			out = make([]byte, 0, len(b)+len(is)+16)
		}
		out = append(out, b[done:start]...)
		if verdict == keep {
			out = appendBytes(out, num, is)
		}
		done, changed = at, true
	}
	if done == 0 {
		return b, changed, v, nil
	}
	return append(out, b[done:]...), true, v, nil
}

// merged walks a message after writing it anew, with each field once.
func (w *walker) merged(s *shape, b []byte) ([]byte, bool, verdict, error) {
	m := s.new().Interface()
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, false, refuse, w.errorf("unmarshal %s: %w", s.name, err)
	}
	packed, err := pack(m)
	if err != nil {
		return nil, false, refuse, w.errorf("%w", err)
	}
	return w.members(s, packed.Value)
}

// member walks the value of a field of holder, which has the shape s.
func (w *walker) member(s *shape, m *member, holder, b []byte) ([]byte, bool, verdict, error) {
	value := b
	if m.isMap {
		value, _ = last(b, mapValue)
	}
	var out []byte
	var changed bool
	var v verdict
	var err error
	if m.shape != nil {
		out, changed, v, err = w.message(m.shape, value)
	} else {
		out, changed, v, err = w.any(s, holder, value)
	}
	if m.isMap && changed && v == keep && err == nil {
		key, _ := edit(b, mapValue, func([]byte) ([]byte, bool) { return nil, false })
		out = appendBytes(slices.Clip(key), mapValue, out)
	}
	return out, changed, v, err
}

// any decides about one extension: translated by its rule, walked if Envoy knows it, or unknown.
func (w *walker) any(s *shape, holder, b []byte) ([]byte, bool, verdict, error) {
	url, value := at(b, anyTypeURL), at(b, anyValue)
	if len(url) == 0 && len(value) == 0 {
		return b, false, keep, nil // there, and nothing in it: no configuration, for Wasm
	}
	name := url[bytes.LastIndexByte(url, '/')+1:]
	e := w.extensions[string(name)]
	var structured *anypb.Any
	if e != nil && e.typedStruct {
		structured = &anypb.Any{TypeUrl: string(url), Value: value}
		effective := effectiveType(structured)
		name = []byte(effective)
		if e = w.extensions[string(effective)]; e != nil && e.typedStruct {
			e = nil // it names none, or another one
		}
	}
	if e == nil {
		w.unknown = append(w.unknown, string(name))
		if s.optional(holder) {
			return nil, true, remove, nil
		}
		return nil, false, refuse, w.errorf("[%s]: the shipped Envoy does not know this type", name)
	}
	if e.shape == nil && e.rule == nil {
		return b, false, keep, nil
	}
	w.path = append(w.path, e.label)
	defer func() { w.path = w.path[:len(w.path)-1] }()
	if e.rule != nil {
		replacement, err := e.rule(&anypb.Any{TypeUrl: string(url), Value: value})
		switch {
		case err != nil:
			return nil, false, refuse, w.errorf("translate: %w", err)
		case replacement == nil:
			return nil, true, remove, nil
		}
		return appendAny(replacement.TypeUrl, replacement.Value), true, keep, nil
	}
	if structured != nil {
		m, err := unstructured(structured, e.shape.new)
		if err != nil {
			return nil, false, refuse, w.errorf("%w", err)
		}
		if m == nil {
			return b, false, keep, nil
		}
		url, value = []byte(m.TypeUrl), m.Value
	}
	inner, changed, v, err := w.message(e.shape, value)
	if err != nil || v == remove || !changed {
		return b, changed, v, err
	}
	return appendAny(string(url), inner), true, keep, nil
}

func appendAny(url string, value []byte) []byte {
	b := make([]byte, 0, len(url)+len(value)+16)
	return appendBytes(appendText(b, anyTypeURL, url), anyValue, value)
}

// errorf says where in the resource something is wrong.
func (w *walker) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %w", strings.Join(w.path, "."), fmt.Errorf(format, args...))
}

// namedOnly are types that Envoy finds by the extension's name, not by type, so that node.extensions does not list them.
var namedOnly = map[protoreflect.FullName]bool{
	"google.protobuf.Struct": true,
	"envoy.extensions.matching.actions.transform_stat.v3.TransformStat": true, // rules of envoy.access_loggers.stats
	"google.protobuf.StringValue":                                       true, // matcher action that names a filter chain
	"google.protobuf.BoolValue":                                         true,
	"google.protobuf.UInt32Value":                                       true,
	// Not an extension itself: wraps the configuration of one in typed_per_filter_config.
	(&route.FilterConfig{}).ProtoReflect().Descriptor().FullName(): true,
	// The resource of ECDS, and what holds an extension elsewhere.
	(&core.TypedExtensionConfig{}).ProtoReflect().Descriptor().FullName(): true,
}

func pack(m proto.Message) (*anypb.Any, error) {
	a := &anypb.Any{}
	// Deterministic, so that an unchanged input gives an unchanged resource and Envoy skips the update.
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return a, nil
}
