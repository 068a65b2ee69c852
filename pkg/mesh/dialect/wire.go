package dialect

import (
	"bytes"
	"iter"

	"google.golang.org/protobuf/encoding/protowire"
)

// This file reads and edits messages as they stand in a resource, in protobuf's wire format. A mesh has clusters and
// endpoints by the thousand, and to decode one costs more than istiod needs to make it. What is not edited keeps its bytes.

// Numbers of the fields that are read without decoding; TestFieldNumbers compares them with the descriptors.
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

	chainFilters, filterTypedConfig = 3, 4
	tcpAccessLog, tcpOptions        = 5, 17
	tcpConnectMode, tcpMaxEarlyData = 21, 22
	tcpOptionsOnConnected           = 2
	accessLogFilter                 = 2
	andFilter, andFilters           = 6, 1
)

// each yields the values of a field of strings, bytes or messages. It ends at the first field that is malformed, which the
// walk refuses.
func each(b []byte, field protowire.Number) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			num, typ, n := protowire.ConsumeTag(b)
			if n < 0 {
				return
			}
			size := protowire.ConsumeFieldValue(num, typ, b[n:])
			if size < 0 {
				return
			}
			if num == field && typ == protowire.BytesType {
				value, _ := protowire.ConsumeBytes(b[n:])
				if !yield(value) {
					return
				}
			}
			b = b[n+size:]
		}
	}
}

// last is a field's value: of more than one on the wire, the last one counts.
func last(b []byte, field protowire.Number) (value []byte, ok bool) {
	for v := range each(b, field) {
		value, ok = v, true
	}
	return value, ok
}

// at follows fields inside of each other, each of which stands once.
func at(b []byte, path ...protowire.Number) []byte {
	for _, field := range path {
		b, _ = last(b, field)
	}
	return b
}

// varint is the value of a number's or an enum's field.
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

// entry is the value of a key in a map with keys of text.
func entry(b []byte, field protowire.Number, key string) (value []byte, ok bool) {
	for e := range each(b, field) {
		if k, _ := last(e, mapKey); string(k) == key {
			value, _ = last(e, mapValue)
			ok = true
		}
	}
	return value, ok
}

// filterMetadata is what the metadata, a field of a message, says in a namespace: a Struct. The field may be there more than
// once; a reader merges them.
func filterMetadata(b []byte, field protowire.Number, namespace string) (value []byte) {
	for metadata := range each(b, field) {
		if v, ok := entry(metadata, metadataFilter, namespace); ok {
			value = v
		}
	}
	return value
}

// textIn is a text in a Struct.
func textIn(b []byte, key string) string {
	v, _ := entry(b, structFields, key)
	return string(at(v, valueString))
}

// text is a key and a value of a Struct.
type text struct{ key, value string }

// withMetadata is a message with texts in the dialect's namespace of its metadata. What follows a message on the wire is
// merged into it, so the metadata gets one entry more. Without texts, or when they are there, it reports false.
func withMetadata(b []byte, field protowire.Number, texts ...text) ([]byte, bool) {
	own := make([]byte, 0, 256)
	for _, t := range texts {
		value := 1 + protowire.SizeBytes(len(t.value))
		own = protowire.AppendTag(own, structFields, protowire.BytesType)
		own = protowire.AppendVarint(own, uint64(2+protowire.SizeBytes(len(t.key))+protowire.SizeBytes(value)))
		own = appendText(own, mapKey, t.key)
		own = protowire.AppendTag(own, mapValue, protowire.BytesType)
		own = protowire.AppendVarint(own, uint64(value))
		own = appendText(own, valueString, t.value)
	}
	if len(texts) == 0 || string(filterMetadata(b, field, ownMetadata)) == string(own) {
		return b, false
	}
	const tags = 2 // of a map entry's key and value
	entry := tags + protowire.SizeBytes(len(ownMetadata)) + protowire.SizeBytes(len(own))
	metadata := 1 + protowire.SizeBytes(entry)
	out := make([]byte, 0, len(b)+protowire.SizeTag(field)+protowire.SizeBytes(metadata))
	out = append(out, b...)
	out = protowire.AppendTag(out, field, protowire.BytesType)
	out = protowire.AppendVarint(out, uint64(metadata))
	out = protowire.AppendTag(out, metadataFilter, protowire.BytesType)
	out = protowire.AppendVarint(out, uint64(entry))
	out = appendText(out, mapKey, ownMetadata)
	out = appendBytes(out, mapValue, own)
	return out, true
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

// isType says whether an Any holds a type.
func isType(a []byte, name string) bool {
	url := at(a, anyTypeURL)
	return string(url[bytes.LastIndexByte(url, '/')+1:]) == name
}

// edit puts something else, or nothing (false), in the place of values of a field. Without a change it returns b itself.
func edit(b []byte, field protowire.Number, change func([]byte) (value []byte, kept bool)) ([]byte, bool) {
	var out []byte
	done, at := 0, 0 // what is in out, and what was read
	for at < len(b) {
		num, typ, n := protowire.ConsumeTag(b[at:])
		if n < 0 {
			break
		}
		size := protowire.ConsumeFieldValue(num, typ, b[at+n:])
		if size < 0 {
			break
		}
		start := at
		at += n + size
		if num != field || typ != protowire.BytesType {
			continue
		}
		was, _ := protowire.ConsumeBytes(b[start+n:])
		is, kept := change(was)
		if kept && same(was, is) {
			continue
		}
		if out == nil {
			out = make([]byte, 0, len(b)+len(is)+len(is)/2)
		}
		out = append(out, b[done:start]...)
		if kept {
			out = appendBytes(out, field, is)
		}
		done = at
	}
	if done == 0 {
		return b, false
	}
	return append(out, b[done:]...), true
}

// same says that two values are one place in memory.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
