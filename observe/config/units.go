package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes. As text it is a whole number with a unit: 512MiB, 2Gi, 2G, 1000000.
type Size int64

// units are Kubernetes' (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/), with or without the B.
func units() []struct {
	name  string
	bytes int64
} {
	return []struct {
		name  string
		bytes int64
	}{
		{"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10},
		{"T", 1e12}, {"G", 1e9}, {"M", 1e6}, {"k", 1e3}, {"K", 1e3}, {"", 1},
	}
}

// String returns the size in the largest unit of which it is a multiple.
func (s Size) String() string {
	for _, u := range units()[:4] {
		if n := int64(s); n >= u.bytes && n%u.bytes == 0 {
			return fmt.Sprintf("%d%sB", n/u.bytes, u.name)
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Set implements pflag.Value.
func (s *Size) Set(text string) error {
	number := strings.TrimSuffix(text, "B")
	for _, u := range units() {
		digits, ok := strings.CutSuffix(number, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || n > uint64(math.MaxInt64/u.bytes) {
			break
		}
		*s = Size(int64(n) * u.bytes)
		return nil
	}
	return errors.New("not a number of bytes such as 2GiB")
}

// Type implements pflag.Value.
func (*Size) Type() string { return "size" }

// days is a duration that may be a number of days: 7d.
type days time.Duration

const day = 24 * time.Hour

// String implements pflag.Value.
func (d days) String() string {
	if n := time.Duration(d); n != 0 && n%day == 0 {
		return strconv.FormatInt(int64(n/day), 10) + "d"
	}
	return time.Duration(d).String()
}

// Set implements pflag.Value.
func (d *days) Set(text string) error {
	if number, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(number, 10, 63)
		if err != nil || n > uint64(math.MaxInt64/day) {
			return errors.New("not a number of days such as 7d")
		}
		*d = days(time.Duration(n) * day)
		return nil
	}
	n, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("not a time such as 7d or 36h")
	}
	*d = days(n)
	return nil
}

// Type implements pflag.Value.
func (*days) Type() string { return "time" }
