package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"

	"polymesh.dev/polymesh/pkg/certificate"
)

// RunningError means that other members of the cluster run, with a majority of it: they continue it.
type RunningError struct {
	// Answering are those that answered, Voters how many the cluster has.
	Answering []Member
	Voters    int
}

func (err *RunningError) Error() string {
	var names []string
	for _, m := range err.Answering {
		names = append(names, fmt.Sprintf("%s (%s)", m, m.URL))
	}
	n := len(err.Answering)
	return fmt.Sprintf("%d of %d members of etcd %s, which is a majority: %s. The cluster works without this server", n, err.Voters, verb(n), strings.Join(names, ", "))
}

// maxMembers is the limit of a member's answer, in bytes.
const maxMembers = 1 << 20

// OthersRun returns a RunningError if other members of the cluster, of which a member that does not run has its data in dir, run with a
// majority. Each that answers knows the members of now, which may be others than those in the data.
func OthersRun(ctx context.Context, dir string, certs certificate.Store) error {
	known, err := membersIn(database(dir))
	if err != nil || len(known) == 0 {
		return nil // no member, or a damaged one: there is no one to ask
	}
	self := ""
	if id, err := readIdentity(dir); err == nil {
		self = id.Name
	}
	var ask []string
	for _, m := range known {
		if m.URL != "" && m.Name != self && m.Name != offlineName {
			ask = append(ask, m.URL)
		}
	}
	if len(ask) == 0 {
		return nil
	}
	config, err := peerTLS(certs)
	if err != nil {
		return fmt.Errorf("ask whether the other members of etcd run, %s: %w", strings.Join(ask, ", "), err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	views := map[string]seen{}
	// The second time those of which the first ones know.
	for range 2 {
		for url, v := range askMembers(ctx, client, ask) {
			views[url] = v
		}
		ask = nil
		for _, v := range views {
			for _, m := range v.members {
				if _, asked := views[m.URL]; !asked && m.URL != "" && m.Name != self {
					ask = append(ask, m.URL)
				}
			}
		}
	}
	for _, v := range views {
		running := &RunningError{}
		for _, m := range v.members {
			if m.Learner {
				continue
			}
			running.Voters++
			if other, ok := views[m.URL]; ok && other.cluster == v.cluster {
				running.Answering = append(running.Answering, m)
			}
		}
		if len(running.Answering) > 0 && len(running.Answering) > running.Voters/2 {
			return running
		}
	}
	return nil
}

// seen is the cluster as a member sees it.
type seen struct {
	cluster string
	members []Member
}

// askMembers asks the members with these addresses, and returns what those that run know, by address.
func askMembers(ctx context.Context, client *http.Client, urls []string) map[string]seen {
	var mu sync.Mutex
	var wait sync.WaitGroup
	all := map[string]seen{}
	for _, url := range urls {
		wait.Go(func() {
			if v, err := askMember(ctx, client, url); err == nil {
				mu.Lock()
				defer mu.Unlock()
				all[url] = v
			}
		})
	}
	wait.Wait()
	return all
}

// askMember requests the members on the port for other members (peerMembersHandler in etcd's api/etcdhttp/peer.go).
func askMember(ctx context.Context, client *http.Client, url string) (v seen, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/members", nil)
	if err != nil {
		return v, err
	}
	response, err := client.Do(request)
	if err != nil {
		return v, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return v, errors.New(response.Status)
	}
	var members []membership.Member
	if err := json.NewDecoder(io.LimitReader(response.Body, maxMembers)).Decode(&members); err != nil {
		return v, err
	}
	v.cluster = response.Header.Get("X-Etcd-Cluster-ID")
	for _, m := range members {
		v.members = append(v.members, memberOf(m))
	}
	slices.SortFunc(v.members, byNode)
	return v, nil
}

// memberOf is a member as etcd keeps it.
func memberOf(m membership.Member) Member {
	member := Member{ID: uint64(m.ID), Name: m.Name, Learner: m.IsLearner}
	if len(m.PeerURLs) > 0 {
		member.URL = m.PeerURLs[0]
	}
	return member
}
