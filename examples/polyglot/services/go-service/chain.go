package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/otel/propagation"
)

const callTimeout = 15 * time.Second

// passedOn are the headers of a request that a call made for it has to carry. The sidecars make the spans and write them
// into these headers; only the app knows which call belongs to which request.
var passedOn = []string{
	"traceparent", "tracestate", "x-request-id", "b3",
	"x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
}

// link is what a service of the chain says of itself.
type link struct {
	Service  string `json:"service"`
	Language string `json:"language"`
	Work     string `json:"work"`
	TraceID  string `json:"trace_id"`
}

type chainResponse struct {
	Chain []link `json:"chain"`
}

// chain asks the next service, which asks its next one, and puts itself before what that answers.
type chain struct {
	nextURL string
	client  *http.Client
}

func (c *chain) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	id, _ := traceOf(r.Header)
	response := chainResponse{Chain: []link{{Service: serviceName, Language: "Go", Work: "gateway", TraceID: id}}}
	if c.nextURL != "" {
		next, err := c.next(r.Context(), r.Header)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			json.NewEncoder(w).Encode(map[string]string{"error": fmt.Sprintf("%s calls %s: %v", serviceName, c.nextURL, err)})
			return
		}
		response.Chain = append(response.Chain, next.Chain...)
	}
	json.NewEncoder(w).Encode(response)
}

func (c *chain) next(ctx context.Context, header http.Header) (*chainResponse, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.nextURL+"/api/v1/chain", nil)
	if err != nil {
		return nil, err
	}
	for _, name := range passedOn {
		if value := header.Get(name); value != "" {
			request.Header.Set(name, value)
		}
	}
	// The app's own span, where it has one, is the parent of the call's.
	w3c.Inject(ctx, propagation.HeaderCarrier(request.Header))
	response, err := c.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", response.Status, text)
	}
	var answer chainResponse
	return &answer, json.Unmarshal(text, &answer)
}

// traceOf is the trace in W3C's header or in B3's; empty without one.
func traceOf(header http.Header) (id, span string) {
	if parts := strings.Split(header.Get("traceparent"), "-"); len(parts) == 4 {
		return parts[1], parts[2]
	}
	return header.Get("x-b3-traceid"), header.Get("x-b3-spanid")
}
