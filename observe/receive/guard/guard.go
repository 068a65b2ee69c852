// Package guard checks a message before it is decoded: decoders recurse into nested messages, some until the process dies, and allocate
// a hundred bytes for the two bytes of an empty message.
//
// It owns no formats: Proto follows the descriptor of what will be decoded, JSON counts brackets. Package receive calls it for everything that
// comes from clients, and others that decode input from outside may use it, too.
package guard

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ErrRefused is wrapped by the errors about messages that must not be decoded.
var ErrRefused = errors.New("the message is refused")

var (
	errDeep = fmt.Errorf("%w: it is nested too deep", ErrRefused)
	errMuch = fmt.Errorf("%w: it has too many elements; send it in parts", ErrRefused)
)

// Limits are what a message may have.
type Limits struct {
	// Depth is how deep messages, or brackets, may be nested.
	Depth int
	// Memory is about how many bytes a decoder may allocate, without texts, which are not larger than the message.
	Memory int
}

// OTLP are limits for a request of OpenTelemetry: a message of 4 MiB of usual spans has 26 MiB of memory; a list in a list in a list has ten levels.
var OTLP = Limits{Depth: 48, Memory: 32 << 20}

const (
	// perMessage, perField and perOneof are the memory of a decoded message itself, of each possible field, and of each oneof.
	perMessage = 40
	perField   = 16
	perOneof   = 40
	// perValue is what another element of a list takes, and a value in JSON.
	perValue = 48
	// perObject is the memory of an object or a list in JSON, without knowing its type.
	perObject = 320
)

// Proto checks a message in protobuf's encoding, and returns about how many bytes of memory its decoder will take. It does not check what a decoder checks
// without harm, such as the types of values.
func Proto(d protoreflect.MessageDescriptor, message []byte, l Limits) (int, error) {
	c := check{left: l.Memory, sizes: map[protoreflect.MessageDescriptor]int{}}
	err := c.message(d, message, l.Depth)
	return l.Memory - c.left, err
}

type check struct {
	left  int // of the memory
	sizes map[protoreflect.MessageDescriptor]int
}

// size returns about the memory of a decoded message, without what it refers to.
func (c *check) size(d protoreflect.MessageDescriptor) int {
	if n, ok := c.sizes[d]; ok {
		return n
	}
	n := perMessage
	for i := range d.Fields().Len() {
		if one := d.Fields().Get(i).ContainingOneof(); one == nil || one.IsSynthetic() {
			n += perField
		}
	}
	for i := range d.Oneofs().Len() {
		if !d.Oneofs().Get(i).IsSynthetic() {
			n += perOneof
		}
	}
	c.sizes[d] = n
	return n
}

func (c *check) take(bytes int) error {
	if c.left -= bytes; c.left < 0 {
		return errMuch
	}
	return nil
}

func (c *check) message(d protoreflect.MessageDescriptor, b []byte, depth int) error {
	if depth == 0 {
		return errDeep
	}
	if err := c.take(c.size(d)); err != nil {
		return err
	}
	fields := d.Fields()
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrRefused, protowire.ParseError(n))
		}
		b = b[n:]
		// Groups nest without a length. proto3 has none.
		if kind == protowire.StartGroupType || kind == protowire.EndGroupType {
			return fmt.Errorf("%w: it has a group", ErrRefused)
		}
		field := fields.ByNumber(number)
		if field != nil && field.IsList() && field.Message() == nil {
			if err := c.take(perValue); err != nil {
				return err
			}
		}
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return fmt.Errorf("%w: %w", ErrRefused, protowire.ParseError(n))
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrRefused, protowire.ParseError(n))
		}
		b = b[n:]
		var err error
		switch {
		case field == nil: // it is not decoded
		case field.Message() != nil:
			err = c.message(field.Message(), value, depth-1)
		case field.IsPacked():
			err = c.take(8 * len(value))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// JSON checks a text that is to be decoded as JSON, and returns about how many bytes of memory its decoder will take. That it is JSON is left to the decoder.
func JSON(text []byte, l Limits) (int, error) {
	depth, memory, quoted := 0, perValue, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '[' || c == '{':
			if depth++; depth > l.Depth {
				return memory, errDeep
			}
			memory += perObject
		case c == ']' || c == '}':
			depth--
		case c == ',':
			memory += perValue
		}
		if memory > l.Memory {
			return memory, errMuch
		}
	}
	return memory, nil
}
