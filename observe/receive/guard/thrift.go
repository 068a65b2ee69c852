package guard

import (
	"encoding/binary"
	"fmt"
)

// The types of values in Thrift's binary encoding (https://github.com/apache/thrift/blob/master/doc/specs/thrift-binary-protocol.md).
const (
	thriftStop   = 0
	thriftString = 11
	thriftStruct = 12
	thriftMap    = 13
	thriftSet    = 14
	thriftList   = 15
)

const (
	// perStruct is the memory of a decoded struct, without knowing its type, and perElement of another element of a list.
	perStruct  = 160
	perElement = 8
)

// Thrift checks a struct in Thrift's binary encoding, and returns about how many bytes of memory its decoder will take. Decoders allocate as
// many elements as a list claims to have; this ensures that they exist.
func Thrift(message []byte, l Limits) (int, error) {
	t := thriftCheck{check: check{left: l.Memory}, rest: message}
	err := t.value(thriftStruct, l.Depth)
	return l.Memory - t.left, err
}

type thriftCheck struct {
	check
	rest []byte
}

var errThriftEnds = fmt.Errorf("%w: it ends too early", ErrRefused)

// next returns the next bytes.
func (t *thriftCheck) next(n int) ([]byte, error) {
	if n > len(t.rest) {
		return nil, errThriftEnds
	}
	b := t.rest[:n]
	t.rest = t.rest[n:]
	return b, nil
}

// length returns the next number of bytes or elements. Each element has at least one byte.
func (t *thriftCheck) length() (int, error) {
	b, err := t.next(4)
	if err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(t.rest)) {
		return 0, errThriftEnds
	}
	return int(n), nil
}

// width returns the length of values that all have the same one, 0 of others.
func width(kind byte) int {
	switch kind {
	case 2, 3: // a bool, a byte
		return 1
	case 6:
		return 2
	case 8:
		return 4
	case 4, 10: // a double, an integer
		return 8
	case 16: // a UUID
		return 16
	}
	return 0
}

// value skips a value.
func (t *thriftCheck) value(kind byte, depth int) error {
	if n := width(kind); n > 0 {
		_, err := t.next(n)
		return err
	}
	if depth == 0 {
		return errDeep
	}
	switch kind {
	case thriftString:
		n, err := t.length()
		if err == nil {
			_, err = t.next(n)
		}
		return err
	case thriftStruct:
		return t.fields(depth - 1)
	case thriftList, thriftSet:
		b, err := t.next(1)
		if err != nil {
			return err
		}
		return t.elements(depth-1, b[0])
	case thriftMap:
		b, err := t.next(2)
		if err != nil {
			return err
		}
		return t.elements(depth-1, b[0], b[1])
	}
	return fmt.Errorf("%w: it has a value of the type %d", ErrRefused, kind)
}

func (t *thriftCheck) fields(depth int) error {
	if err := t.take(perStruct); err != nil {
		return err
	}
	for {
		kind, err := t.next(1)
		if err != nil || kind[0] == thriftStop {
			return err
		}
		if _, err := t.next(2); err != nil { // the field's number
			return err
		}
		if err := t.value(kind[0], depth); err != nil {
			return err
		}
	}
}

// elements skips the elements of a list, or the keys and values of a map.
func (t *thriftCheck) elements(depth int, kinds ...byte) error {
	n, err := t.length()
	if err == nil {
		err = t.take(n * perElement * len(kinds))
	}
	for ; err == nil && n > 0; n-- {
		for _, kind := range kinds {
			if err == nil {
				err = t.value(kind, depth)
			}
		}
	}
	return err
}
