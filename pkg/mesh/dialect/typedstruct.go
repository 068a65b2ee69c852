package dialect

import (
	"errors"
	"fmt"
	"strings"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	xds "github.com/cncf/xds/go/xds/type/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	udpaTypedStruct protoreflect.FullName = "udpa.type.v1.TypedStruct"
	xdsTypedStruct  protoreflect.FullName = "xds.type.v3.TypedStruct"
)

// effectiveType is the type by which Envoy finds an extension: a TypedStruct stands for the type that it names
// (Envoy source/common/config/utility.cc, Utility::getFactoryType).
func effectiveType(a *anypb.Any) protoreflect.FullName {
	name := a.MessageName()
	if name != udpaTypedStruct && name != xdsTypedStruct {
		return name
	}
	url, _, err := typedStruct(a)
	if err != nil {
		return name
	}
	return protoreflect.FullName(url[strings.LastIndexByte(url, '/')+1:])
}

func typedStruct(a *anypb.Any) (url string, value *structpb.Struct, err error) {
	m, err := a.UnmarshalNew()
	if err != nil {
		return "", nil, fmt.Errorf("unmarshal %s: %w", a.MessageName(), err)
	}
	switch ts := m.(type) {
	case *udpa.TypedStruct:
		return ts.TypeUrl, ts.Value, nil
	case *xds.TypedStruct:
		return ts.TypeUrl, ts.Value, nil
	}
	return "", nil, fmt.Errorf("%s is no TypedStruct", a.MessageName())
}

// unpack returns the message in an Any, through a TypedStruct too. It returns nil for a type that Envoy knows and this
// program does not, because it cannot look inside.
func (w *walker) unpack(a *anypb.Any) (proto.Message, error) {
	name := a.MessageName()
	if name != udpaTypedStruct && name != xdsTypedStruct {
		m, err := a.UnmarshalNew()
		if errors.Is(err, protoregistry.NotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("unmarshal %s: %w", name, err)
		}
		return m, nil
	}
	_, value, err := typedStruct(a)
	if err != nil {
		return nil, err
	}
	mt, err := protoregistry.GlobalTypes.FindMessageByName(effectiveType(a))
	if err != nil {
		return nil, nil
	}
	js, err := protojson.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("marshal %s: %w", name, err)
	}
	m := mt.New().Interface()
	if err := protojson.Unmarshal(js, m); err != nil {
		// Envoy reads the same text and is the one to accept or reject it.
		return nil, nil
	}
	return m, nil
}
