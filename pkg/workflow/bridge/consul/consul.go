// Package consul speaks to HashiCorp's Consul by its HTTP interface (https://developer.hashicorp.com/consul/api-docs): it
// lists services with their health, and registers, renews and withdraws instances for pkg/workflow/bridge.
//
// It is a client of our own because nine requests are all there is to it. HashiCorp's brings Serf, a logger and some ten
// modules more into the program, asks one address only, and takes its address, token and TLS files from the environment
// where it is not told, which would make a bridge speak to another Consul than its command line says.
//
// What Consul calls an agent keeps the services that were registered with it, and the catalog has those of all agents. So
// services are read from the catalog, by any agent, and an instance of the mesh belongs to the agent that was asked.
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
	// leastTTL is how long Consul shows an instance of the mesh to callers without being told that the bridge lives. What it
	// names is the mesh's gateway, which does not go when the bridge is restarted.
	leastTTL = time.Minute
	// forgetAfter is when Consul takes such an instance out by itself.
	forgetAfter = 10 * time.Minute
	// ownerKey is the metadata that tells the bridge's instances from the old system's.
	ownerKey = "polymesh-bridge"
	// ownService is what Consul's servers register of themselves. It is in every catalog, and no one's to call.
	ownService = "consul"
	// atOnce is how many services are asked for at the same time.
	atOnce = 8
)

var (
	_ bridge.Advertiser = (*Client)(nil)
	_ bridge.Holder     = (*Client)(nil)
)

// Client is one datacenter of Consul, by one or more of its agents.
type Client struct {
	agents servers.Servers
	token  string
	ttl    time.Duration
}

// New returns a client. Agents are addresses such as http://host:8500. The first one that answers is asked. The token may be
// empty. Interval is the time from one look of the bridge to the next, which is when it can renew.
func New(client *http.Client, agents []string, token string, interval time.Duration) (*Client, error) {
	if len(agents) == 0 {
		return nil, errors.New("no Consul agent is named")
	}
	own := *client
	// The token is for the address that was named, not for the one that answers "it is over there".
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	authorize := func(request *http.Request, _ *url.URL) {
		if token != "" {
			request.Header.Set("X-Consul-Token", token)
		}
	}
	c := &Client{agents: servers.Servers{Client: &own, Authorize: authorize}, token: token, ttl: max(leastTTL, 4*interval)}
	for _, a := range agents {
		u, err := url.Parse(strings.TrimSpace(a))
		// What is wrong may be that it holds a secret, so it is not repeated.
		if err != nil || u.User != nil || u.RawQuery != "" {
			return nil, errors.New("an address of Consul cannot be read: it should look like http://host:8500, without a user and without a token")
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

// Services lists what is registered in the datacenter, but for Consul itself and the proxies and gateways of its own mesh.
func (c *Client) Services(ctx context.Context) ([]bridge.Service, error) {
	r, err := c.ask(ctx, http.MethodGet, []string{"catalog", "services"}, nil, nil)
	if err != nil {
		return nil, err
	}
	var names map[string][]string
	if err := r.read("list the services", &names); err != nil {
		return nil, err
	}
	// To those who may see nothing Consul answers that there is nothing.
	if _, ok := names[ownService]; !ok {
		return nil, c.blind("services", "service")
	}
	services := make([]bridge.Service, len(names))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, name := range slices.Sorted(maps.Keys(names)) {
		group.Go(func() error {
			entries, err := c.entries(ctx, name)
			if err == nil && name == ownService && len(entries) == 0 {
				err = c.blind("nodes", "node")
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

// blind is the error for an answer without what every Consul has.
func (c *Client) blind(what, rule string) error {
	rule += `_prefix "" {policy = "read"}`
	why := "so its ACLs hide them: the bridge needs a token with the rule " + rule + ", by --token-file"
	if c.token != "" {
		why = "so its ACLs hide them: the token needs the rule " + rule
	}
	return fmt.Errorf("no %s are shown by Consul, not even its own, %s. (One that has just started is also like that, for a moment)", what, why)
}

// entries asks for a service's instances, with their health. One that is not there has none.
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
		return nil, fmt.Errorf("the token may read service %s, but not all of its nodes, so its instances are not known (it needs the rule %s)", service, `node_prefix "" {policy = "read"}`)
	}
	return entries, nil
}

// RenewEvery leaves time for some attempts.
func (c *Client) RenewEvery() time.Duration { return renewEvery }

// Register registers an instance with the first agent that answers. Registering it again sets it right.
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

// Renew passes the instance's check. The agent does not know it if it has lost its memory, or if another agent was asked
// before: what is there goes by itself.
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

// Withdraw takes an instance from every agent, and from the catalog where an agent has died with it.
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
	// An agent that is away keeps nothing: the catalog is what callers see.
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

// Release ends the maintenance mode.
func (c *Client) Release(ctx context.Context, service, id string) error {
	return c.maintain(ctx, service, id, url.Values{"enable": {"false"}})
}

// maintain asks the agent that has the instance: the others cannot do it.
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

// agentOf finds the agent with which an instance is registered.
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

// find is where an instance is in the catalog, by the id that pkg/workflow/bridge knows. The bridge's own may be with more than one
// agent.
func (c *Client) find(ctx context.Context, service, id string) ([]entry, error) {
	entries, err := c.entries(ctx, service)
	return slices.DeleteFunc(entries, func(e entry) bool { return e.id() != id }), err
}

// reply is what an agent has said.
type reply struct{ servers.Reply }

// ask asks the agents in their order, until one answers. An agent answers 500 when the servers have no leader.
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

// filtered says that the token may not see all of it.
func (r reply) filtered() bool { return r.Header.Get("X-Consul-Results-Filtered-By-ACLs") == "true" }

// check wants the answer to be that it is done.
func (r reply) check(what string) error {
	if r.Status == http.StatusOK {
		return nil
	}
	err := fmt.Errorf("the answer of Consul is %d to: %s%s", r.Status, what, r.Text())
	if r.Status == http.StatusForbidden {
		err = fmt.Errorf("%w (is the token right, and does it allow this?)", err)
	}
	return err
}

// read reads an answer. One that is not Consul's is an error, not an empty registry.
func (r reply) read(what string, into any) error {
	if err := r.check(what); err != nil {
		return err
	}
	if err := json.Unmarshal(r.Body, into); err != nil {
		return fmt.Errorf("the answer of Consul to %q cannot be read: %w", what, err)
	}
	return nil
}
