// Package consul is a client for the HTTP API of HashiCorp's Consul (https://developer.hashicorp.com/consul/api-docs): it
// lists services with their health, and registers, renews and withdraws instances for pkg/workflow/bridge.
//
// It is our own client because only nine requests are needed. HashiCorp's client adds Serf, a logger and about ten
// more modules to the program, supports only one address, and falls back to address, token and TLS files from the
// environment, so that a bridge could use a different Consul than the one on its command line.
//
// A Consul agent keeps the services that were registered with it, and the catalog has those of all agents. So
// services are read from the catalog, through any agent, and an instance of the mesh belongs to the agent that registered it.
package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/pkg/workflow/bridge/servers"
)

const (
	renewEvery = 15 * time.Second
	// leastTTL is how long Consul keeps showing an instance of the mesh to callers without a heartbeat from the bridge. The
	// instance is the mesh's gateway, which keeps running when the bridge is restarted.
	leastTTL = time.Minute
	// forgetAfter is when Consul removes such an instance by itself.
	forgetAfter = 10 * time.Minute
	// ownerKey is the metadata key that distinguishes the bridge's instances from the old system's.
	ownerKey = "polymesh-bridge"
	// ownService is the service that Consul's servers register for themselves. It is in every catalog, and not for callers.
	ownService = "consul"
	// atOnce is the number of services queried in parallel.
	atOnce = 8
)

var (
	_ bridge.Advertiser = (*Client)(nil)
	_ bridge.Holder     = (*Client)(nil)
)

// Client is a client for one Consul datacenter, through one or more of its agents.
type Client struct {
	agents servers.Servers
	token  string
	ttl    time.Duration
}

// New returns a client. Agents are addresses such as http://host:8500; the first one that responds is used. The token may be
// empty. Interval is the time between two passes of the bridge, and thus between two heartbeats.
func New(client *http.Client, agents []string, token string, interval time.Duration) (*Client, error) {
	if len(agents) == 0 {
		return nil, errors.New("no Consul agent is specified")
	}
	own := *client
	// The token is only for the specified address, not for the target of a redirect.
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	authorize := func(request *http.Request, _ *url.URL) {
		if token != "" {
			request.Header.Set("X-Consul-Token", token)
		}
	}
	c := &Client{agents: servers.Servers{Client: &own, Authorize: authorize}, token: token, ttl: max(leastTTL, 4*interval)}
	for _, a := range agents {
		u, err := url.Parse(strings.TrimSpace(a))
		// The invalid part may contain a secret, so it is not repeated.
		if err != nil || u.User != nil || u.RawQuery != "" {
			return nil, errors.New("an address of Consul is not valid: it should look like http://host:8500, without a user and without a token")
		}
		if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return nil, fmt.Errorf("%s is not an address of Consul: it should look like http://host:8500", u)
		}
		c.agents.Addresses = append(c.agents.Addresses, u)
	}
	return c, nil
}

// String lists the agents.
func (c *Client) String() string { return c.agents.String() }

// Services lists the services in the datacenter, except Consul itself and the proxies and gateways of its own mesh.
func (c *Client) Services(ctx context.Context) ([]bridge.Service, error) {
	r, err := c.ask(ctx, http.MethodGet, []string{"catalog", "services"}, nil, nil)
	if err != nil {
		return nil, err
	}
	var names map[string][]string
	if err := r.read("list the services", &names); err != nil {
		return nil, err
	}
	// A token without permissions gets an empty list instead of an error.
	if _, ok := names[ownService]; !ok {
		return nil, c.hiddenByACLs("services", "service")
	}
	services := make([]bridge.Service, len(names))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, name := range slices.Sorted(maps.Keys(names)) {
		group.Go(func() error {
			entries, err := c.entries(ctx, name)
			if err == nil && name == ownService && len(entries) == 0 {
				err = c.hiddenByACLs("nodes", "node")
			}
			services[i] = bridge.Service{Name: name, Instances: translate(entries)}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(services, func(s bridge.Service) bool { return s.Name == ownService || len(s.Instances) == 0 }), nil
}

// hiddenByACLs is the error for a response that lacks what every Consul has.
func (c *Client) hiddenByACLs(what, rule string) error {
	rule += `_prefix "" {policy = "read"}`
	why := "so ACLs hide them: the bridge needs a token with the rule " + rule + ", by --token-file"
	if c.token != "" {
		why = "so ACLs hide them: the token needs the rule " + rule
	}
	return fmt.Errorf("no %s are returned by Consul, not even its own, %s. (This also happens briefly after Consul has started)", what, why)
}

// entries returns a service's instances, with their health. An unknown service has none.
func (c *Client) entries(ctx context.Context, service string) ([]entry, error) {
	r, err := c.ask(ctx, http.MethodGet, []string{"health", "service", service}, nil, nil)
	if err != nil {
		return nil, err
	}
	var entries []entry
	if err := r.read("list the instances of "+service, &entries); err != nil {
		return nil, err
	}
	if r.filtered() {
		return nil, fmt.Errorf("the token can read service %s, but not all of its nodes, so its instances are unknown (it needs the rule %s)", service, `node_prefix "" {policy = "read"}`)
	}
	return entries, nil
}

// RenewEvery leaves time for several attempts.
func (c *Client) RenewEvery() time.Duration { return renewEvery }

// Register registers an instance with the first agent that responds, or updates it.
func (c *Client) Register(ctx context.Context, a bridge.Advert) error {
	body, err := json.Marshal(registration(a, c.ttl))
	if err != nil {
		return err
	}
	r, err := c.ask(ctx, http.MethodPut, []string{"agent", "service", "register"}, url.Values{"replace-existing-checks": {"true"}}, body)
	if err != nil {
		return err
	}
	return r.check("register " + a.ID)
}

// Renew passes the instance's check. The agent does not have the instance if it has lost its data, or if another agent was used
// before, whose entry expires by itself.
func (c *Client) Renew(ctx context.Context, a bridge.Advert) (bool, error) {
	r, err := c.ask(ctx, http.MethodPut, []string{"agent", "check", "pass", checkID(a)}, nil, nil)
	if err != nil || r.Status == http.StatusNotFound {
		return false, err
	}
	if err := r.check("renew " + a.ID); err != nil {
		return false, err
	}
	return true, nil
}

// Withdraw removes an instance from every agent, and from the catalog if its agent is dead.
func (c *Client) Withdraw(ctx context.Context, service, id string) error {
	var failures []error
	for _, agent := range c.agents.Addresses {
		r, err := c.askOne(ctx, agent, http.MethodPut, []string{"agent", "service", "deregister", serviceID(service, id)}, nil)
		if err == nil && r.Status != http.StatusNotFound {
			err = r.check("withdraw " + id)
		}
		if err != nil {
			failures = append(failures, err)
		}
	}
	// An unreachable agent does not matter: callers see the catalog.
	if len(failures) == len(c.agents.Addresses) {
		return errors.Join(failures...)
	}
	left, err := c.find(ctx, service, id)
	if err != nil {
		return err
	}
	for _, e := range left {
		body, err := json.Marshal(map[string]string{"Node": e.Node.Name, "ServiceID": e.Service.ID})
		if err != nil {
			return err
		}
		r, err := c.ask(ctx, http.MethodPut, []string{"catalog", "deregister"}, nil, body)
		if err == nil {
			err = r.check("withdraw " + id + " of node " + e.Node.Name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Hold puts an instance into maintenance mode, so that callers do not see it.
func (c *Client) Hold(ctx context.Context, service, id string) error {
	return c.maintain(ctx, service, id, url.Values{"enable": {"true"}, "reason": {"the mesh answers in its place (polymesh bridge)"}})
}

// Release ends maintenance mode.
func (c *Client) Release(ctx context.Context, service, id string) error {
	return c.maintain(ctx, service, id, url.Values{"enable": {"false"}})
}

// maintain sends the request to the instance's agent: only that one can do it.
func (c *Client) maintain(ctx context.Context, service, id string, how url.Values) error {
	entries, err := c.find(ctx, service, id)
	if err != nil {
		return err
	}
	for _, e := range entries {
		agent, err := c.agentOf(ctx, e)
		if err != nil {
			return err
		}
		r, err := c.askOne(ctx, agent, http.MethodPut, []string{"agent", "service", "maintenance", e.Service.ID}, how)
		if err == nil && r.Status != http.StatusNotFound {
			err = r.check("change the maintenance mode of " + id)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// agentOf finds the agent that an instance is registered with.
func (c *Client) agentOf(ctx context.Context, e entry) (*url.URL, error) {
	var failures []error
	for _, agent := range c.agents.Addresses {
		var self struct {
			Config struct{ NodeName string }
		}
		r, err := c.askOne(ctx, agent, http.MethodGet, []string{"agent", "self"}, nil)
		if err == nil {
			err = r.read(`say which node it is (the rule agent_prefix "" {policy = "read"} allows that)`, &self)
		}
		if err != nil {
			failures = append(failures, err)
			continue
		}
		if self.Config.NodeName == e.Node.Name {
			return agent, nil
		}
	}
	return nil, errors.Join(append(failures, fmt.Errorf("%s is registered with the agent of node %s, which alone can put it into maintenance mode: name that agent in --consul too, or do it there, with `consul maint -service=%s`",
		e.Service.ID, e.Node.Name, e.Service.ID))...)
}

// find returns an instance's catalog entries, by the id used in pkg/workflow/bridge. The bridge's own may be registered with more than one
// agent.
func (c *Client) find(ctx context.Context, service, id string) ([]entry, error) {
	entries, err := c.entries(ctx, service)
	return slices.DeleteFunc(entries, func(e entry) bool { return e.id() != id }), err
}

// reply is an agent's response.
type reply struct{ servers.Reply }

// ask sends a request to the agents in order, until one responds. An agent responds with 500 if the servers have no leader.
func (c *Client) ask(ctx context.Context, method string, path []string, query url.Values, body []byte) (reply, error) {
	r, err := c.agents.Ask(ctx, request(method, path, query, body))
	return reply{r}, err
}

func (c *Client) askOne(ctx context.Context, agent *url.URL, method string, path []string, query url.Values) (reply, error) {
	r, err := c.agents.AskOne(ctx, agent, request(method, path, query, nil))
	return reply{r}, err
}

func request(method string, path []string, query url.Values, body []byte) servers.Request {
	return servers.Request{Method: method, Path: append([]string{"v1"}, path...), Query: query.Encode(), Body: body}
}

// filtered reports whether ACLs have removed parts of the response.
func (r reply) filtered() bool { return r.Header.Get("X-Consul-Results-Filtered-By-ACLs") == "true" }

// check returns an error unless the request succeeded.
func (r reply) check(what string) error {
	if r.Status == http.StatusOK {
		return nil
	}
	err := fmt.Errorf("the answer of Consul is %d for: %s%s", r.Status, what, r.Text())
	if r.Status == http.StatusForbidden {
		err = fmt.Errorf("%w (is the token right, and does it allow this?)", err)
	}
	return err
}

// read decodes a response. One that is not Consul's is an error, not an empty registry.
func (r reply) read(what string, into any) error {
	if err := r.check(what); err != nil {
		return err
	}
	if err := json.Unmarshal(r.Body, into); err != nil {
		return fmt.Errorf("parse Consul's response to %q: %w", what, err)
	}
	return nil
}
