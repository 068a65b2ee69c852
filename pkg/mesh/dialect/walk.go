package dialect

import (
	"bytes"
	"fmt"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// verdict is the result for an extension.
type verdict int

const (
	keep verdict = iota
	// remove drops the message that holds the extension (an HttpFilter, an AccessLog …) from its list or map.
	remove
	// refuse gives up on the resource: see Translator.Resource.
	refuse
)

// walker translates one resource. It visits every google.protobuf.Any, including nested ones, so that extension
// positions need not be known by name. It reads the wire format and skips fields that cannot hold an Any.
type walker struct {
	*Translator
	edits
	around surroundings
	// unknown lists the types that neither Envoy nor a rule supports.
	unknown []string
	// path is the walker's position, for error messages.
	path []string
}

// message walks the message in[from:to] and returns the verdict of its own extension.
func (w *walker) message(s *shape, from, to int) (verdict, error) {
	within := w.around.within
	v, err := w.ruled(s, from, to)
	w.around.within = within
	return v, err
}

// ruled runs the rules for the message's type, before and after its contents are walked.
func (w *walker) ruled(s *shape, from, to int) (verdict, error) {
	instead, changed, err := w.enter(s, w.in[from:to])
	if err != nil {
		return refuse, w.errorf("%w", err)
	}
	if changed {
		out, _, v, err := w.inside(instead, func() (verdict, error) { return w.members(s, 0, len(instead)) })
		if err == nil && v == keep {
			w.change(from, to-from, out)
		}
		return v, err
	}
	return w.members(s, from, to)
}

// enter returns the message to walk, and whether it replaces the original.
func (w *walker) enter(s *shape, b []byte) ([]byte, bool, error) {
	if s.wire.enter != nil {
		return s.wire.enter(&w.around, b)
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

// inside walks a message that replaces a part of the resource.
func (w *walker) inside(b []byte, walk func() (verdict, error)) (out []byte, changed bool, v verdict, err error) {
	outer := w.edits
	w.edits = edits{in: b}
	v, err = walk()
	out, changed = w.edits.out()
	w.edits = outer
	return out, changed, v, err
}

func (w *walker) members(s *shape, from, to int) (v verdict, err error) {
	before := length{len(w.made), w.grown}
	var met [2]uint64
	for at := from; at < to; {
		num, typ, n := protowire.ConsumeTag(w.in[at:to])
		if n < 0 {
			return refuse, w.errorf("unmarshal %s: %w", s.name, protowire.ParseError(n))
		}
		size := protowire.ConsumeFieldValue(num, typ, w.in[at+n:to])
		if size < 0 {
			return refuse, w.errorf("unmarshal %s: %w", s.name, protowire.ParseError(size))
		}
		start := at
		at += n + size
		m := s.member(num)
		if m == nil || typ != protowire.BytesType {
			continue
		}
		if !m.many {
			if met[m.index/64]&(1<<(m.index%64)) != 0 {
				// The field occurs twice, which no encoder writes. Merge it, so that nothing can be hidden.
				w.discard(before)
				return w.merged(s, from, to)
			}
			met[m.index/64] |= 1 << (m.index % 64)
		}
		_, prefix := protowire.ConsumeVarint(w.in[start+n : at])
		value := span{start + n, start + n + prefix, at}
		if m.isMap && !singleValue(w.in[value.from:value.to]) {
			w.discard(before)
			return w.merged(s, from, to)
		}
		opened := w.open()
		w.path = append(w.path, m.name)
		is, err := w.member(s, m, w.in[from:to], value)
		w.path = w.path[:len(w.path)-1]
		switch {
		case err != nil:
			return refuse, err
		case is == keep:
			w.close(opened, value.length, value.from, value.to)
		case m.many:
			w.discard(opened)
			w.change(start, at-start, nil)
		case m.shape == nil:
			// The extension of this message: drop the message with it.
			w.discard(opened)
			v = remove
		default:
			// A singular field: the message may be invalid or unsafe without it.
			return refuse, w.errorf("%s cannot be left out of %s", m.name, s.name)
		}
	}
	if v == keep && s.wire.leave != nil {
		if err := s.wire.leave(&w.around, &w.edits, from, to); err != nil {
			return refuse, w.errorf("%w", err)
		}
	}
	return v, nil
}

// merged walks a re-encoded message, in which each field occurs once.
func (w *walker) merged(s *shape, from, to int) (verdict, error) {
	m := s.new().Interface()
	if err := proto.Unmarshal(w.in[from:to], m); err != nil {
		return refuse, w.errorf("unmarshal %s: %w", s.name, err)
	}
	packed, err := pack(m)
	if err != nil {
		return refuse, w.errorf("%w", err)
	}
	out, _, v, err := w.inside(packed.Value, func() (verdict, error) { return w.members(s, 0, len(packed.Value)) })
	if err == nil && v == keep {
		w.change(from, to-from, out)
	}
	return v, err
}

// span is the value of a field, and the offset of its length prefix.
type span struct{ length, from, to int }

// value returns the span of a message or bytes field that occurs at most once.
func (w *walker) value(field protowire.Number, from, to int) (value span, ok bool) {
	for at := from; at < to; {
		num, typ, n := protowire.ConsumeTag(w.in[at:to])
		if n < 0 {
			break
		}
		size := protowire.ConsumeFieldValue(num, typ, w.in[at+n:to])
		if size < 0 {
			break
		}
		if num == field && typ == protowire.BytesType {
			_, prefix := protowire.ConsumeVarint(w.in[at+n : to])
			value, ok = span{at + n, at + n + prefix, at + n + size}, true
		}
		at += n + size
	}
	return value, ok
}

// singleValue reports whether a map entry has at most one value.
func singleValue(entry []byte) bool {
	n := 0
	for range valuesOf(entry, mapValue) {
		n++
	}
	return n <= 1
}

// member walks the value of a field of holder, whose shape is s.
func (w *walker) member(s *shape, m *member, holder []byte, value span) (verdict, error) {
	if m.isMap {
		in, ok := w.value(mapValue, value.from, value.to)
		if !ok {
			return keep, nil
		}
		opened := w.open()
		v, err := w.held(s, m, holder, in.from, in.to)
		w.close(opened, in.length, in.from, in.to)
		return v, err
	}
	return w.held(s, m, holder, value.from, value.to)
}

func (w *walker) held(s *shape, m *member, holder []byte, from, to int) (verdict, error) {
	if m.shape != nil {
		return w.message(m.shape, from, to)
	}
	return w.any(s, holder, from, to)
}

// any decides about one extension: translate it by its rule, walk it if Envoy supports it, or report it as unknown.
func (w *walker) any(s *shape, holder []byte, from, to int) (verdict, error) {
	packed := w.in[from:to]
	url, value := valueAt(packed, anyTypeURL), valueAt(packed, anyValue)
	if len(url) == 0 && len(value) == 0 {
		return keep, nil // present but empty: Wasm without configuration
	}
	name := url[bytes.LastIndexByte(url, '/')+1:]
	e := w.extensions[string(name)]
	var structured *anypb.Any
	if e != nil && e.typedStruct {
		structured = &anypb.Any{TypeUrl: string(url), Value: value}
		effective := effectiveType(structured)
		name = []byte(effective)
		if e = w.extensions[string(effective)]; e != nil && e.typedStruct {
			e = nil // names no type, or another TypedStruct
		}
	}
	if e == nil {
		w.unknown = append(w.unknown, string(name))
		if s.optional(holder) {
			return remove, nil
		}
		return refuse, w.errorf("[%s]: the shipped Envoy does not support this type", name)
	}
	if e.shape == nil && e.rule == nil {
		return keep, nil
	}
	w.path = append(w.path, e.label)
	v, err := w.known(e, string(url), value, structured, from, to)
	w.path = w.path[:len(w.path)-1]
	return v, err
}

// known translates or walks an extension that has a rule or contents to visit. It is in[from:to], and also in structured
// if it is written as a TypedStruct.
func (w *walker) known(e *extension, url string, value []byte, structured *anypb.Any, from, to int) (verdict, error) {
	if e.rule != nil {
		replacement, err := e.rule(&anypb.Any{TypeUrl: url, Value: value})
		switch {
		case err != nil:
			return refuse, w.errorf("translate: %w", err)
		case replacement == nil:
			return remove, nil
		}
		w.change(from, to-from, appendAny(replacement.TypeUrl, replacement.Value))
		return keep, nil
	}
	if structured == nil && len(w.in[from:to]) == sizeOfAny(url, value) {
		// In the encoders' canonical form: edit it in place.
		in, _ := w.value(anyValue, from, to)
		opened := w.open()
		v, err := w.message(e.shape, in.from, in.to)
		w.close(opened, in.length, in.from, in.to)
		return v, err
	}
	if structured != nil {
		m, err := unstructured(structured, e.shape.new)
		if err != nil {
			return refuse, w.errorf("%w", err)
		}
		if m == nil {
			return keep, nil
		}
		url, value = m.TypeUrl, m.Value
	}
	out, changed, v, err := w.inside(value, func() (verdict, error) { return w.message(e.shape, 0, len(value)) })
	if err == nil && v == keep && changed {
		w.change(from, to-from, appendAny(url, out))
	}
	return v, err
}

// sizeOfAny returns the length of an Any that holds exactly one non-empty type URL and value.
func sizeOfAny(url string, value []byte) int {
	if len(url) == 0 || len(value) == 0 {
		return -1
	}
	const tags = 2
	return tags + protowire.SizeBytes(len(url)) + protowire.SizeBytes(len(value))
}

func appendAny(url string, value []byte) []byte {
	b := make([]byte, 0, len(url)+len(value)+16)
	return appendBytes(appendText(b, anyTypeURL, url), anyValue, value)
}

// errorf adds the position in the resource to an error.
func (w *walker) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %w", strings.Join(w.path, "."), fmt.Errorf(format, args...))
}

// namedOnly are types that Envoy finds by the extension's name instead of its type, so node.extensions does not list them.
var namedOnly = map[protoreflect.FullName]bool{
	"google.protobuf.Struct": true,
	"envoy.extensions.matching.actions.transform_stat.v3.TransformStat": true, // rules of envoy.access_loggers.stats
	"envoy.config.rbac.v3.Action":                                       true, // of an RBAC filter's matcher
	"google.protobuf.StringValue":                                       true, // matcher action that names a filter chain
	"google.protobuf.BoolValue":                                         true,
	"google.protobuf.UInt32Value":                                       true,
	// A wrapper for extension configuration in typed_per_filter_config, not an extension itself.
	(&route.FilterConfig{}).ProtoReflect().Descriptor().FullName(): true,
	// The resource of ECDS, and a wrapper for extensions elsewhere.
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
