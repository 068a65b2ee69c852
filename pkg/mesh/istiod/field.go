// Package istiod accesses parts of Istio's control plane that Istio does not expose: unexported fields (Field), and
// the response to `istioctl proxy-status`, which can block a proxy's pushes permanently (KeepStatusApart).
//
// cmd/pilot-discovery and pkg/mesh/certify call it, between bootstrap.NewServer and Start.
package istiod

import (
	"fmt"
	"reflect"
)

// Field returns the struct field with this name and type. Name, type and presence of a value are checked, so that an incompatible Istio
// fails at startup, and in the build's tests.
func Field[T any](of reflect.Value, name string) (*T, error) {
	field, err := fieldOf[T](of, name)
	if err == nil && reflect.ValueOf(field).Elem().IsZero() {
		return nil, fmt.Errorf("%s of %s has no value", name, of.Type())
	}
	return field, err
}

// fieldOf is Field for a field whose value may be missing.
func fieldOf[T any](of reflect.Value, name string) (*T, error) {
	field := of.FieldByName(name)
	if !field.IsValid() || field.Type() != reflect.TypeFor[T]() {
		return nil, fmt.Errorf("%s has no %s of type %s", of.Type(), name, reflect.TypeFor[T]())
	}
	return (*T)(field.Addr().UnsafePointer()), nil
}
