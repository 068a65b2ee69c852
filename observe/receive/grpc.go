package receive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // which SDKs and collectors use
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// prefix is the prefix of a gRPC message.
const prefix = 5

// GRPC serves OTLP/gRPC over HTTP/2. The caller must bound the number of connections and calls.
//
// gRPC's own server would take a slot for a call before its message has arrived. Therefore HTTP's
// server reads the message and passes it to gRPC's.
func (r *Receiver) GRPC() http.Handler {
	server := grpc.NewServer(grpc.ForceServerCodecV2(codec{}), grpc.MaxRecvMsgSize(MaxMessage))
	for _, s := range r.signals() {
		server.RegisterService(&grpc.ServiceDesc{
			ServiceName: s.service, HandlerType: (*any)(nil),
			// On the wire a call with one message is a stream of one message.
			Streams: []grpc.StreamDesc{{
				StreamName: "Export", ClientStreams: true, ServerStreams: true,
				Handler: func(_ any, stream grpc.ServerStream) error { return r.serveGRPC(stream, s) },
			}},
		}, nil)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		raw, release, err := r.arrive(w, req, prefix+MaxMessage)
		if err != nil {
			failed := status.Convert(err)
			h := w.Header()
			h.Set("Content-Type", "application/grpc")
			h.Set("Grpc-Status", strconv.Itoa(int(failed.Code())))
			h.Set("Grpc-Message", failed.Message())
			return
		}
		defer release()
		req.Body = io.NopCloser(bytes.NewReader(raw))
		server.ServeHTTP(w, req)
	})
}

func (r *Receiver) serveGRPC(stream grpc.ServerStream, s signal) error {
	var message []byte
	switch err := stream.RecvMsg(&message); {
	case err == io.EOF:
		return refused(errors.New("the call has no message"))
	case err != nil:
		return err
	}
	answer, err := r.export(stream.Context(), s, message)
	if err != nil {
		return err
	}
	return stream.SendMsg(answer)
}

// codec leaves received messages undecoded, so that they are checked first.
type codec struct{}

// Name is the content subtype that gRPC's clients send.
func (codec) Name() string { return "proto" }

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(data mem.BufferSlice, into any) error {
	message, ok := into.(*[]byte)
	if !ok {
		return fmt.Errorf("a message is received as bytes, not as %T", into)
	}
	*message = data.Materialize()
	return nil
}

// Marshal implements encoding.CodecV2.
func (codec) Marshal(answer any) (mem.BufferSlice, error) {
	message, ok := answer.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is not a message", answer)
	}
	text, err := proto.Marshal(message)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(text)}, nil
}
