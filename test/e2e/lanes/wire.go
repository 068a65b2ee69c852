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

// The environment of a test program that is run here.
const (
	// PlanEnv names a file to which each test writes what it needs, in place of running.
	PlanEnv = "POLYMESH_E2E_PLAN"
	// socketEnv and laneEnv tell a lane whom to ask for its next test, and as whom.
	socketEnv = "POLYMESH_E2E_SOCKET"
	laneEnv   = "POLYMESH_E2E_LANE"
)

// Declare writes down what a test needs, to the file of PlanEnv.
func Declare(file string, t Test) error {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(f).Encode(t), f.Close())
}

// request is what a lane asks with, and answer what it is given; an empty Test is the end.
type request struct {
	Lane   int        `json:"lane"`
	Shared SharedNode `json:"shared"`
}

type answer struct {
	Test string `json:"test"`
}

// InLane reports whether this process is a lane, which runs what Next returns.
func InLane() bool { return os.Getenv(socketEnv) != "" }

// Next asks for the lane's next test. It returns an empty name when there is none.
func Next(ctx context.Context, state SharedNode) (string, error) {
	lane, err := strconv.Atoi(os.Getenv(laneEnv))
	if err != nil {
		return "", fmt.Errorf("%s: %w", laneEnv, err)
	}
	connection, err := (&net.Dialer{}).DialContext(ctx, "unix", os.Getenv(socketEnv))
	if err != nil {
		return "", fmt.Errorf("ask for the next test: %w", err)
	}
	defer connection.Close()
	var a answer
	if err = json.NewEncoder(connection).Encode(request{lane, state}); err == nil {
		err = json.NewDecoder(connection).Decode(&a)
	}
	if err != nil {
		return "", fmt.Errorf("ask for the next test: %w", err)
	}
	return a.Test, nil
}

// serve answers lanes until the listener is closed.
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
			// A lane that has died meanwhile is noticed by its end.
			_ = json.NewEncoder(connection).Encode(answer{t.Name})
		}()
	}
}
