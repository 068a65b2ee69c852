package dialect

import (
	"fmt"
	"strings"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	xds "github.com/cncf/xds/go/xds/type/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	udpaTypedStruct protoreflect.FullName = "udpa.type.v1.TypedStruct"
	xdsTypedStruct  protoreflect.FullName = "xds.type.v3.TypedStruct"
)

// effectiveType returns the type by which Envoy finds an extension: a TypedStruct stands for the type named in it
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
	return "", nil, fmt.Errorf("%s is not a TypedStruct", a.MessageName())
}

// unstructured converts a TypedStruct into the message that it stands for. It returns nil if the contents do not fit the type:
// Envoy reads the same and decides whether to reject it.
func unstructured(a *anypb.Any, empty func() protoreflect.Message) (*anypb.Any, error) {
	_, value, err := typedStruct(a)
	if err != nil {
		return nil, err
	}
	js, err := protojson.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("marshal %s: %w", a.MessageName(), err)
	}
	m := empty().Interface()
	if err := protojson.Unmarshal(js, m); err != nil {
		return nil, nil
	}
	return pack(m)
}
