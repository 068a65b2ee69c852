package dialect

import (
	"fmt"
	"strings"

	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
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

const (
	anyName      protoreflect.FullName = "google.protobuf.Any"
	metadataName protoreflect.FullName = "envoy.config.core.v3.Metadata"
)

// walker translates one resource. It visits every google.protobuf.Any in it by reflection, also those inside others, so
// that no extension position has to be known by name.
type walker struct {
	*Translator
	around surroundings
	// unknown lists the types that neither Envoy nor a rule knows.
	unknown []string
	// path is where the walker is, for error texts.
	path []string
}

// message walks m and reports whether it changed anything, and what m's own extension means for m.
func (w *walker) message(m protoreflect.Message) (changed bool, v verdict, err error) {
	if rule, ok := messageRules[m.Descriptor().FullName()]; ok {
		changed, err = rule(&w.around, m.Interface())
		if err != nil {
			return changed, refuse, w.errorf("%w", err)
		}
	}
	// Deleting from a message while ranging over it is not allowed; the fields are few.
	type field struct {
		fd  protoreflect.FieldDescriptor
		val protoreflect.Value
	}
	var fields []field
	m.Range(func(fd protoreflect.FieldDescriptor, val protoreflect.Value) bool {
		if fd.Message() != nil {
			fields = append(fields, field{fd, val})
		}
		return true
	})
	for _, f := range fields {
		// Typed metadata is data for whoever reads it: Envoy ignores types that it does not know.
		if m.Descriptor().FullName() == metadataName && f.fd.Name() == "typed_filter_metadata" {
			continue
		}
		w.path = append(w.path, string(f.fd.Name()))
		c, fv, err := w.field(m, f.fd, f.val)
		w.path = w.path[:len(w.path)-1]
		changed = changed || c
		if err != nil {
			return changed, refuse, err
		}
		if fv == remove {
			v = remove
		}
	}
	return changed, v, nil
}

// field walks one set field of m. A verdict of remove is about m itself.
func (w *walker) field(m protoreflect.Message, fd protoreflect.FieldDescriptor, val protoreflect.Value) (bool, verdict, error) {
	changed := false
	switch {
	case fd.IsList():
		list, kept := val.List(), 0
		for i := range list.Len() {
			el := list.Get(i)
			c, v, err := w.value(m, el.Message())
			if err != nil {
				return changed, refuse, err
			}
			changed = changed || c || v == remove
			if v == remove {
				continue
			}
			if kept != i {
				list.Set(kept, el)
			}
			kept++
		}
		if kept != list.Len() {
			list.Truncate(kept)
		}
	case fd.IsMap():
		if fd.MapValue().Message() == nil {
			return false, keep, nil
		}
		var gone []protoreflect.MapKey
		var failed error
		val.Map().Range(func(k protoreflect.MapKey, el protoreflect.Value) bool {
			c, v, err := w.value(m, el.Message())
			changed = changed || c || v == remove
			if v == remove {
				gone = append(gone, k)
			}
			failed = err
			return err == nil
		})
		if failed != nil {
			return changed, refuse, failed
		}
		for _, k := range gone {
			val.Map().Clear(k)
		}
	case fd.Message().FullName() == anyName:
		// The extension of m: m goes with it.
		return w.value(m, val.Message())
	default:
		c, v, err := w.value(m, val.Message())
		if err != nil {
			return c, refuse, err
		}
		if v == remove {
			// One and only: nothing says that the message is valid or safe without it.
			return c, refuse, w.errorf("%s cannot be left out of %s", fd.Name(), m.Descriptor().FullName())
		}
		return c, keep, nil
	}
	return changed, keep, nil
}

// value walks a message-typed value that is held by a field of holder.
func (w *walker) value(holder, m protoreflect.Message) (bool, verdict, error) {
	if a, ok := m.Interface().(*anypb.Any); ok {
		return w.any(holder, a)
	}
	return w.message(m)
}

// any decides about one extension: translated by its rule, walked if Envoy knows it, or unknown.
func (w *walker) any(holder protoreflect.Message, a *anypb.Any) (bool, verdict, error) {
	name := effectiveType(a)
	w.path = append(w.path, "["+string(name)+"]")
	defer func() { w.path = w.path[:len(w.path)-1] }()
	if rule, ok := extensionRules[name]; ok {
		replacement, err := rule(a)
		switch {
		case err != nil:
			return false, refuse, w.errorf("translate: %w", err)
		case replacement == nil:
			return true, remove, nil
		}
		a.TypeUrl, a.Value = replacement.TypeUrl, replacement.Value
		return true, keep, nil
	}
	if !w.known[string(name)] && !namedOnly[name] {
		w.unknown = append(w.unknown, string(name))
		if optional(holder) {
			return true, remove, nil
		}
		return false, refuse, w.errorf("the shipped Envoy does not know this type")
	}
	inner, err := w.unpack(a)
	if err != nil {
		return false, refuse, w.errorf("%w", err)
	}
	if inner == nil {
		return false, keep, nil
	}
	changed, v, err := w.message(inner.ProtoReflect())
	if err != nil || v == remove || !changed {
		return changed, v, err
	}
	packed, err := pack(inner)
	if err != nil {
		return changed, refuse, err
	}
	a.TypeUrl, a.Value = packed.TypeUrl, packed.Value
	return true, keep, nil
}

// errorf says where in the resource something is wrong.
func (w *walker) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %w", strings.Join(w.path, "."), fmt.Errorf(format, args...))
}

// optional says whether Envoy's own contract or the purpose of a position allows leaving out an extension that nobody
// knows. Everything else may enforce security (RBAC, authentication, TLS), so it is refused.
func optional(holder protoreflect.Message) bool {
	switch h := holder.Interface().(type) {
	case *hcm.HttpFilter:
		return h.IsOptional // Envoy: "clients that do not support this filter may ignore the filter"
	case *route.FilterConfig:
		return h.IsOptional
	case *accesslog.AccessLog:
		return true // observes, never decides
	}
	return false
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
