package config

import (
	"errors"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
)

// Size is a number of bytes. As text it is a quantity of Kubernetes, with or without the B: 512MiB, 2Gi, 2G, 1000000.
type Size int64

// String returns the size in the largest unit of which it is a multiple.
func (s Size) String() string {
	text := resource.NewQuantity(int64(s), resource.BinarySI).String()
	if strings.HasSuffix(text, "i") {
		text += "B"
	}
	return text
}

// Set implements pflag.Value.
func (s *Size) Set(text string) error {
	q, err := resource.ParseQuantity(strings.TrimSuffix(text, "B"))
	n := q.Value()
	// A quantity may have a sign, or no digits before its unit.
	if err != nil || q.CmpInt64(n) != 0 || text[0] < '0' || text[0] > '9' {
		return errors.New("not a number of bytes such as 2GiB")
	}
	*s = Size(n)
	return nil
}

// Type implements pflag.Value.
func (*Size) Type() string { return "size" }
