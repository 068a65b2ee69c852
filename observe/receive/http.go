package receive

import (
	"mime"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

const (
	protobufType = "application/x-protobuf"
	jsonType     = "application/json"
)

// HTTP serves OTLP/HTTP: POST /v1/traces, /v1/logs and /v1/metrics.
func (r *Receiver) HTTP() http.Handler {
	mux := http.NewServeMux()
	for _, s := range r.signals() {
		mux.HandleFunc("POST "+s.path, func(w http.ResponseWriter, req *http.Request) { r.serveOTLP(w, req, s) })
	}
	return mux
}

func (r *Receiver) serveOTLP(w http.ResponseWriter, req *http.Request, s signal) {
	kind, _, err := mime.ParseMediaType(req.Header.Get("Content-Type"))
	if err != nil || kind != protobufType && kind != jsonType {
		http.Error(w, "the content type is not "+protobufType+" or "+jsonType, http.StatusUnsupportedMediaType)
		return
	}
	answer, err := r.readOTLP(w, req, s, kind)
	if err != nil {
		failed := status.Convert(err)
		code := httpCode(failed.Code())
		if code == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "5")
		}
		writeOTLP(w, kind, code, failed.Proto())
		return
	}
	writeOTLP(w, kind, http.StatusOK, answer)
}

func (r *Receiver) readOTLP(w http.ResponseWriter, req *http.Request, s signal, kind string) (proto.Message, error) {
	message, release, err := r.receive(w, req)
	if err != nil {
		return nil, err
	}
	defer release()
	if kind == jsonType {
		return r.exportJSON(req.Context(), s, message)
	}
	return r.export(req.Context(), s, message)
}

// httpCode returns the status for a failure, which tells clients whether to retry.
func httpCode(c codes.Code) int {
	switch c {
	case codes.InvalidArgument:
		return http.StatusBadRequest
	case codes.ResourceExhausted:
		return http.StatusRequestEntityTooLarge
	case codes.Unimplemented:
		return http.StatusUnsupportedMediaType
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// writeOTLP answers in the encoding of the request.
func writeOTLP(w http.ResponseWriter, kind string, code int, answer proto.Message) {
	marshal := proto.Marshal
	if kind == jsonType {
		marshal = protojson.Marshal
	}
	text, err := marshal(answer)
	if err != nil { // our own messages marshal
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(readTime))
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(code)
	_, _ = w.Write(text)
}
