// Package istiod reaches into Istio's control plane where Istio has no way in: at fields that it does not export (Field), and at
// its answer to `istioctl proxy-status`, which can stop a proxy's pushes for good (KeepStatusApart).
//
// cmd/pilot-discovery and pkg/mesh/certify call it, between bootstrap.NewServer and Start.
package istiod

import (
	"fmt"
	"reflect"
)

// Field is a struct's field of this name and type, which has a value. The name, the type and the value are checked, so that an Istio that has
// changed ends istiod at its start, and the build's tests.
func Field[T any](of reflect.Value, name string) (*T, error) {
	field, err := fieldOf[T](of, name)
	if err == nil && reflect.ValueOf(field).Elem().IsZero() {
		return nil, fmt.Errorf("%s of %s has no value", name, of.Type())
	}
	return field, err
}

// fieldOf is Field, of which the value may be missing.
func fieldOf[T any](of reflect.Value, name string) (*T, error) {
	field := of.FieldByName(name)
	if !field.IsValid() || field.Type() != reflect.TypeFor[T]() {
		return nil, fmt.Errorf("%s has no %s of type %s", of.Type(), name, reflect.TypeFor[T]())
	}
	return (*T)(field.Addr().UnsafePointer()), nil
}
