package member

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/status"
)

// Paths of the node's status socket.
const (
	membersPath = "/etcd/members"
	removePath  = "/etcd/remove"
)

// list is the response of membersPath.
type list struct {
	Self    uint64        `json:"self"`
	Members []etcd.Member `json:"members"`
}

// removal is the request of removePath.
type removal struct {
	ID uint64 `json:"id"`
}

// Serve lets commands on this machine list and remove members, on the status socket of the running server. e is nil for another datastore, which kind
// names.
func Serve(s *status.Server, e *etcd.Etcd, kind string) {
	handle := func(pattern string, do func(*http.Request) (any, error)) {
		s.Handle(pattern, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if e == nil {
				status.Refuse(w, http.StatusNotImplemented, fmt.Errorf("the datastore of this server is %s, and not etcd on the servers: there are no members", kind))
				return
			}
			response, err := do(r)
			if err != nil {
				status.Refuse(w, http.StatusConflict, err)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(response)
		}))
	}
	handle("GET "+membersPath, func(r *http.Request) (any, error) {
		members, err := e.Members(r.Context())
		id, _ := e.ID()
		return list{id, members}, err
	})
	handle("POST "+removePath, func(r *http.Request) (any, error) {
		var request removal
		if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
			return nil, err
		}
		return struct{}{}, e.Remove(r.Context(), request.ID)
	})
}

// NotHereError means that this machine's node has no member of etcd, and why.
type NotHereError struct{ message string }

func (err *NotHereError) Error() string { return err.message }

// Local is the running server of this machine.
type Local struct {
	// Socket is its status socket.
	Socket string
}

// Members returns the members as this machine's server knows them, also without a majority, and the id of its own. The error is a
// NotHereError if it has none.
func (l Local) Members(ctx context.Context) (members []etcd.Member, self uint64, err error) {
	var response list
	if err := l.call(ctx, http.MethodGet, membersPath, nil, &response); err != nil {
		return nil, 0, err
	}
	return response.Members, response.Self, nil
}

// Works returns etcd.QuorumError if this machine's server knows that etcd has no majority that answers. The API server answers nothing then.
func (l Local) Works(ctx context.Context) error {
	members, _, err := l.Members(ctx)
	if err != nil {
		return nil // not a server, not running, or with another datastore
	}
	return etcd.Works(members)
}

// Remove removes a member: see etcd.Etcd.Remove.
func (l Local) Remove(ctx context.Context, id uint64) error {
	return l.call(ctx, http.MethodPost, removePath, removal{id}, &struct{}{})
}

// RemoveNamed removes the member that is named by its node, its own name, or its id in hexadecimal form, and returns it. One whose node
// exists stays: its server would end. kubeconfig is this server's, for the nodes; they are not checked while the API server does not answer.
func (l Local) RemoveNamed(ctx context.Context, name, kubeconfig string) (etcd.Member, error) {
	members, self, err := l.Members(ctx)
	if err != nil {
		return etcd.Member{}, err
	}
	m, err := find(members, self, name)
	if err != nil {
		return m, err
	}
	if exists, err := recorded(ctx, kubeconfig, m); err == nil && exists {
		return m, fmt.Errorf("node %s exists: `polymesh node remove %s` removes it with its member of etcd", m.Node(), m.Node())
	}
	return m, l.Remove(ctx, m.ID)
}

// find returns the member with a name, or why none can be removed by it.
func find(members []etcd.Member, self uint64, name string) (found etcd.Member, err error) {
	matches := 0
	for _, m := range members {
		if memberID(m.ID) == name || m.Name != "" && (m.Name == name || m.Node() == name) {
			found = m
			matches++
		}
	}
	switch {
	case matches == 0:
		return found, fmt.Errorf("etcd has no member %s: `polymesh etcd members` lists them", name)
	case matches > 1:
		return found, fmt.Errorf("etcd has %d members of node %s: give the ID of one, from `polymesh etcd members`", matches, name)
	case found.ID == self:
		return found, fmt.Errorf("%s is this server's own member: `polymesh reset` removes this server from the cluster", name)
	}
	return found, nil
}

// nodeTimeout is the time to look for a member's node.
const nodeTimeout = 5 * time.Second

// recorded reports whether the node of a member exists.
func recorded(ctx context.Context, file string, m etcd.Member) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	client, err := kubeconfig.Client(file, nil)
	if err != nil {
		return false, err
	}
	records, err := Records(ctx, client)
	if err != nil {
		return false, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return false, err
	}
	for _, n := range nodes.Items {
		if of, ok := Of([]etcd.Member{m}, records, &n); ok && of.ID == m.ID {
			return true, nil
		}
	}
	return false, nil
}

// gone waits until etcd does not have a member any more, or also reports so, or ctx ends.
func (l Local) gone(ctx context.Context, id uint64, also func() bool) error {
	for !also() {
		members, _, err := l.Members(ctx)
		if err == nil && !slices.ContainsFunc(members, func(m etcd.Member) bool { return m.ID == id }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("still a member after %s", removeTimeout), err)
		case <-time.After(removePoll):
		}
	}
	return nil
}

func (l Local) call(ctx context.Context, method, path string, body, response any) error {
	err := status.Call(ctx, l.Socket, method, path, body, response)
	var refused *status.RefusedError
	switch {
	case !errors.As(err, &refused):
		return err
	case refused.Status == http.StatusNotImplemented:
		return &NotHereError{refused.Message}
	case refused.Status != http.StatusNotFound:
		return err
	}
	// An agent has none of these paths, and a server that is starting not yet.
	report, err := status.Ask(ctx, l.Socket)
	if err != nil {
		return err
	}
	if report.Role == status.RoleAgent {
		return &NotHereError{"this node is an agent, and has no member of etcd: run it on a server"}
	}
	return errors.New("this server is starting: try again")
}
