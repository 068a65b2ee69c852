package lanes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
)

// The environment of a test program that Run starts.
const (
	// PlanEnv names a file to which each test writes what it needs, instead of running.
	PlanEnv = "POLYMESH_E2E_PLAN"
	// socketEnv and laneEnv are the socket from which a lane gets its next test, and the lane's number.
	socketEnv = "POLYMESH_E2E_SOCKET"
	laneEnv   = "POLYMESH_E2E_LANE"
)

// Declare writes what a test needs to the file of PlanEnv.
func Declare(file string, t Test) error {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(f).Encode(t), f.Close())
}

// request and response are the messages between a lane and Run; an empty Test is the end.
type request struct {
	Lane   int        `json:"lane"`
	Shared SharedNode `json:"shared"`
}

type response struct {
	Test string `json:"test"`
}

// InLane reports whether this process is a lane, which runs what Next returns.
func InLane() bool { return os.Getenv(socketEnv) != "" }

// Next requests the lane's next test. It returns an empty name if there is none.
func Next(ctx context.Context, state SharedNode) (string, error) {
	lane, err := strconv.Atoi(os.Getenv(laneEnv))
	if err != nil {
		return "", fmt.Errorf("%s: %w", laneEnv, err)
	}
	connection, err := (&net.Dialer{}).DialContext(ctx, "unix", os.Getenv(socketEnv))
	if err != nil {
		return "", fmt.Errorf("request the next test: %w", err)
	}
	defer connection.Close()
	var r response
	if err = json.NewEncoder(connection).Encode(request{lane, state}); err == nil {
		err = json.NewDecoder(connection).Decode(&r)
	}
	if err != nil {
		return "", fmt.Errorf("request the next test: %w", err)
	}
	return r.Test, nil
}

// serve responds to lanes until the listener is closed.
func (q *queue) serve(listener net.Listener, taken func(lane int, t Test)) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer connection.Close()
			var r request
			if json.NewDecoder(connection).Decode(&r) != nil {
				return
			}
			t, ok := q.next(r.Lane, r.Shared)
			if ok {
				taken(r.Lane, t)
			}
			// If the lane has died, its end is noticed elsewhere.
			_ = json.NewEncoder(connection).Encode(response{t.Name})
		}()
	}
}
