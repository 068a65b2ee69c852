package dialect

import (
	"bytes"
	"iter"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// This file reads and edits messages in protobuf's wire format. A mesh has thousands of clusters and endpoints, and decoding
// one costs more than istiod needs to generate it. Fields that are not edited keep their bytes.

// Numbers of the fields that are read without decoding. TestFieldNumbers compares them with the descriptors.
const (
	anyTypeURL, anyValue = 1, 2
	mapKey, mapValue     = 1, 2

	clusterName, clusterTransportSocket, clusterMetadataField = 1, 24, 25
	clusterProtocolOptions, clusterSocketMatches              = 36, 43
	socketMatchSocket                                         = 3
	socketTypedConfig                                         = 3
	upstreamTLSCommon                                         = 1
	commonTLSALPN                                             = 4
	httpOptionsExplicit, httpOptionsDownstream                = 3, 4
	explicitHTTP2                                             = 2

	assignmentCluster, assignmentEndpoints = 1, 2
	localityEndpoints                      = 2
	lbEndpoint, lbEndpointMetadata         = 1, 3
	endpointAddress                        = 1
	addressSocket                          = 1
	socketAddress                          = 2

	metadataFilter           = 1
	structFields             = 1
	valueString, valueStruct = 3, 5
	valueList, listValues    = 6, 1
	listenerTrafficDirection = 16

	chainFilters, filterTypedConfig = 3, 4 // also an HTTP filter's
	chainTransportSocket            = 6
	filterName                      = 1
	httpFilters, httpFilterName     = 5, 1
	httpAccessLog                   = 13
	tcpAccessLog, tcpOptions        = 5, 17
	tcpConnectMode, tcpMaxEarlyData = 21, 22
	tcpOptionsInterval              = 1
	tcpOptionsOnConnected           = 2
	accessLogFilter                 = 2
	andFilter, andFilters           = 6, 1
)

// field is the position of a string, bytes or message field: its start, and the range of its value.
type field struct {
	number          protowire.Number
	start, from, to int
}

// fields yields the string, bytes and message fields in b[from:to]. It stops at the first malformed field; the walk
// rejects those.
func fields(b []byte, from, to int) iter.Seq[field] {
	return func(yield func(field) bool) {
		for at := from; at < to; {
			num, typ, n := protowire.ConsumeTag(b[at:to])
			if n < 0 {
				return
			}
			size := protowire.ConsumeFieldValue(num, typ, b[at+n:to])
			if size < 0 {
				return
			}
			start := at
			at += n + size
			if typ == protowire.BytesType {
				_, prefix := protowire.ConsumeVarint(b[start+n : at])
				if !yield(field{num, start, start + n + prefix, at}) {
					return
				}
			}
		}
	}
}

// valuesOf yields the values of a string, bytes or message field.
func valuesOf(b []byte, number protowire.Number) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for f := range fields(b, 0, len(b)) {
			if f.number == number && !yield(b[f.from:f.to]) {
				return
			}
		}
	}
}

// firstValue returns the first value of a repeated field.
func firstValue(b []byte, number protowire.Number) (value []byte, ok bool) {
	for value := range valuesOf(b, number) {
		return value, true
	}
	return nil, false
}

// lastValue returns the value of a singular field: if it occurs more than once on the wire, the last one wins.
func lastValue(b []byte, number protowire.Number) (value []byte, ok bool) {
	for f := range fields(b, 0, len(b)) {
		if f.number == number {
			value, ok = b[f.from:f.to], true
		}
	}
	return value, ok
}

// valueAt follows a path of singular message fields.
func valueAt(b []byte, path ...protowire.Number) []byte {
	for _, number := range path {
		b, _ = lastValue(b, number)
	}
	return b
}

// varint returns the value of a number or enum field.
func varint(b []byte, field protowire.Number) (value uint64) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return value
		}
		size := protowire.ConsumeFieldValue(num, typ, b[n:])
		if size < 0 {
			return value
		}
		if num == field && typ == protowire.VarintType {
			value, _ = protowire.ConsumeVarint(b[n:])
		}
		b = b[n+size:]
	}
	return value
}

// mapEntry returns the value of a key in a map with string keys.
func mapEntry(b []byte, field protowire.Number, key string) (value []byte, ok bool) {
	for e := range valuesOf(b, field) {
		if k, _ := lastValue(e, mapKey); string(k) == key {
			value, _ = lastValue(e, mapValue)
			ok = true
		}
	}
	return value, ok
}

// filterMetadata returns the Struct for a namespace in a metadata field. The field may occur more than once; readers merge
// them.
func filterMetadata(b []byte, field protowire.Number, namespace string) (value []byte) {
	for metadata := range valuesOf(b, field) {
		if v, ok := mapEntry(metadata, metadataFilter, namespace); ok {
			value = v
		}
	}
	return value
}

// valueIn returns a Value in a Struct.
func valueIn(b []byte, key string) []byte {
	v, _ := mapEntry(b, structFields, key)
	return v
}

// textIn returns a string in a Struct.
func textIn(b []byte, key string) string { return string(valueAt(valueIn(b, key), valueString)) }

// keyText is a key and string value of a Struct.
type keyText struct{ key, value string }

// addMetadata adds strings to the dialect's namespace in the metadata of the message in[from:to]. Repeated occurrences of a
// message are merged on reading, so this appends one more, unless the strings are already there.
func (e *edits) addMetadata(from, to int, number protowire.Number, texts ...keyText) {
	if len(texts) == 0 {
		return
	}
	size := 0 // of the Struct
	for _, t := range texts {
		size += 1 + protowire.SizeBytes(t.entrySize())
	}
	const tags = 2 // of a map entry's key and value
	entry := tags + protowire.SizeBytes(len(ownMetadata)) + protowire.SizeBytes(size)
	begin := len(e.scratch)
	b := protowire.AppendTag(e.scratch, number, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(1+protowire.SizeBytes(entry)))
	b = protowire.AppendTag(b, metadataFilter, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(entry))
	b = appendText(b, mapKey, ownMetadata)
	b = protowire.AppendTag(b, mapValue, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	own := len(b)
	for _, t := range texts {
		b = protowire.AppendTag(b, structFields, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(t.entrySize()))
		b = appendText(b, mapKey, t.key)
		b = protowire.AppendTag(b, mapValue, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(t.valueSize()))
		b = appendText(b, valueString, t.value)
	}
	e.scratch = b
	if !bytes.Equal(filterMetadata(e.in[from:to], number, ownMetadata), b[own:]) {
		e.change(to, 0, b[begin:len(b):len(b)])
	}
}

// replaceMetadata replaces the Struct of a metadata namespace, in a message that ends at `to`. Readers of a map take the last of
// two entries with the same key.
func (e *edits) replaceMetadata(to int, number protowire.Number, namespace string, value []byte) {
	entry := appendBytes(appendText(nil, mapKey, namespace), mapValue, value)
	e.change(to, 0, appendBytes(nil, number, appendBytes(nil, metadataFilter, entry)))
}

// withText returns a Struct with a key set to another string.
func withText(b []byte, key, value string) []byte {
	entry := appendBytes(appendText(nil, mapKey, key), mapValue, appendText(nil, valueString, value))
	return appendBytes(slices.Clip(b), structFields, entry)
}

// valueSize is the encoded size of the value, entrySize that of its entry in a Struct.
func (t keyText) valueSize() int { return 1 + protowire.SizeBytes(len(t.value)) }

func (t keyText) entrySize() int {
	const tags = 2 // of the key and the value
	return tags + protowire.SizeBytes(len(t.key)) + protowire.SizeBytes(t.valueSize())
}

func appendText(b []byte, field protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), value)
}

func appendBytes(b []byte, field protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), value)
}

func appendVarint(b []byte, field protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), value)
}

// isType reports whether an encoded Any holds a type.
func isType(a []byte, name string) bool {
	url := valueAt(a, anyTypeURL)
	return string(url[bytes.LastIndexByte(url, '/')+1:]) == name
}
