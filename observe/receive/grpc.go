package receive

import (
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip" // which SDKs and collectors use
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// GRPC returns a server for OTLP/gRPC. Whoever serves with it bounds the number of its connections; one that is idle takes about 20 KB, and is closed after some
// minutes.
func (r *Receiver) GRPC() *grpc.Server {
	server := grpc.NewServer(
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxConcurrentStreams(16),
		grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(readTime),
		// The windows are what a client can make the server hold before anybody reads: without these, they grow with the client's speed.
		grpc.InitialWindowSize(64<<10),
		grpc.InitialConnWindowSize(128<<10),
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(4<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	for _, s := range r.signals() {
		server.RegisterService(&grpc.ServiceDesc{
			ServiceName: s.service, HandlerType: (*any)(nil),
			// On the wire a call with one message is a stream of one message. As a stream it is not read before there is a slot for it.
			Streams: []grpc.StreamDesc{{
				StreamName: "Export", ClientStreams: true, ServerStreams: true,
				Handler: func(_ any, stream grpc.ServerStream) error { return r.serveGRPC(stream, s) },
			}},
		}, nil)
	}
	return server
}

func (r *Receiver) serveGRPC(stream grpc.ServerStream, s signal) error {
	release, err := r.slot(stream.Context())
	if err != nil {
		return err
	}
	defer release()
	message, err := receiveOne(stream)
	if err != nil {
		return err
	}
	answer, err := r.export(stream.Context(), s, message)
	if err != nil {
		return err
	}
	return stream.SendMsg(answer)
}

// receiveOne reads a message. A client that does not send it in time is left.
func receiveOne(stream grpc.ServerStream) ([]byte, error) {
	type received struct {
		message []byte
		err     error
	}
	done := make(chan received, 1)
	go func() { // ends with the stream, at the latest
		var one received
		one.err = stream.RecvMsg(&one.message)
		done <- one
	}()
	timer := time.NewTimer(readTime)
	defer timer.Stop()
	select {
	case one := <-done:
		if one.err == io.EOF {
			return nil, refused(errors.New("the call has no message"))
		}
		return one.message, one.err
	case <-timer.C:
		return nil, status.Error(codes.DeadlineExceeded, "the request took too long to arrive")
	}
}

// codec leaves what is received undecoded, so that it is looked at first.
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
		return nil, fmt.Errorf("%T is no message", answer)
	}
	text, err := proto.Marshal(message)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(text)}, nil
}
