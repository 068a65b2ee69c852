// Package eureka is a client for the REST API of Netflix Eureka, the one that Spring Cloud's clients use
// (https://github.com/Netflix/eureka/wiki/Eureka-REST-operations): it lists services, and registers, renews and withdraws
// instances for pkg/workflow/bridge.
//
// It is our own client because only six requests are needed; the Go libraries for Eureka have not been maintained for
// years, and their retries and caches would hide from the bridge whether the registry has responded.
package eureka

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/pkg/workflow/bridge/servers"
)

const (
	// renewEvery is the interval of Eureka's own clients, which its self-preservation relies on.
	renewEvery = 30 * time.Second
	// lease is how long an instance of the mesh stays without heartbeats. It is longer than the usual 90 seconds: the
	// instance is the mesh's gateway, which keeps running when the bridge is restarted.
	lease = 5 * time.Minute
	// ownerKey is the metadata key that distinguishes the bridge's instances from the old system's. Eureka writes keys as XML elements,
	// which allow few characters.
	ownerKey = "polymesh-bridge"
)

var (
	_ bridge.Advertiser = (*Client)(nil)
	_ bridge.Holder     = (*Client)(nil)
)

// Client is a client for one Eureka, with one or more servers that share their data.
type Client struct {
	servers servers.Servers
}

// New returns a client. Servers are addresses such as those in Spring's eureka.client.service-url.defaultZone:
// http://host:8761/eureka/. The first one that responds is used. Credentials in an address override user and password.
func New(client *http.Client, addresses []string, user, password string) (*Client, error) {
	if len(addresses) == 0 {
		return nil, errors.New("no Eureka server is specified")
	}
	c := &Client{servers.Servers{Client: client, Authorize: func(request *http.Request, server *url.URL) {
		user, password := user, password
		if server.User != nil {
			user = server.User.Username()
			password, _ = server.User.Password()
		}
		if user != "" {
			request.SetBasicAuth(user, password)
		}
	}}}
	for _, s := range addresses {
		u, err := url.Parse(strings.TrimSpace(s))
		if err != nil {
			// The parser's own message repeats the address, which may hold a password.
			return nil, errors.New("an address of Eureka is not a valid URL: it should look like http://host:8761/eureka/")
		}
		if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" {
			return nil, fmt.Errorf("%s is not an address of Eureka: it should look like http://host:8761/eureka/", u.Redacted())
		}
		c.servers.Addresses = append(c.servers.Addresses, u)
	}
	return c, nil
}

// String lists the servers.
func (c *Client) String() string { return c.servers.String() }

// Services lists the registered services.
func (c *Client) Services(ctx context.Context) ([]bridge.Service, error) {
	r, err := c.servers.Ask(ctx, servers.Request{Method: http.MethodGet, Path: []string{"apps"}})
	if err == nil && r.Status != http.StatusOK {
		err = unexpected("list the services", r.Status)
	}
	if err != nil {
		return nil, err
	}
	return parse(r.Body)
}

// RenewEvery is Eureka's default heartbeat.
func (c *Client) RenewEvery() time.Duration { return renewEvery }

// Register registers an instance, or updates it.
func (c *Client) Register(ctx context.Context, a bridge.Advert) error {
	body, err := json.Marshal(map[string]any{"instance": registration(a)})
	if err != nil {
		return err
	}
	r, err := c.servers.Ask(ctx, servers.Request{Method: http.MethodPost, Path: []string{"apps", appName(a.Service)}, Body: body})
	if err == nil && r.Status != http.StatusNoContent && r.Status != http.StatusOK {
		err = unexpected("register "+a.ID, r.Status)
	}
	return err
}

// Renew sends a heartbeat. A restarted Eureka does not have the instance any more.
func (c *Client) Renew(ctx context.Context, a bridge.Advert) (bool, error) {
	r, err := c.servers.Ask(ctx, servers.Request{Method: http.MethodPut, Path: []string{"apps", appName(a.Service), a.ID}})
	switch {
	case err != nil:
		return false, err
	case r.Status == http.StatusNotFound:
		return false, nil
	case r.Status != http.StatusOK:
		return false, unexpected("renew "+a.ID, r.Status)
	}
	return true, nil
}

// Withdraw cancels an instance.
func (c *Client) Withdraw(ctx context.Context, service, id string) error {
	return c.change(ctx, http.MethodDelete, []string{"apps", appName(service), id}, "", "withdraw "+id)
}

// Hold overrides an instance's status, so that callers do not see it. The instance's own heartbeats do not change that.
func (c *Client) Hold(ctx context.Context, service, id string) error {
	return c.change(ctx, http.MethodPut, []string{"apps", appName(service), id, "status"}, "value="+string(bridge.OutOfService), "hold "+id)
}

// Release removes the override. The given status applies until the instance reports its own.
func (c *Client) Release(ctx context.Context, service, id string) error {
	return c.change(ctx, http.MethodDelete, []string{"apps", appName(service), id, "status"}, "value="+string(bridge.Up), "release "+id)
}

// change treats a missing instance as success.
func (c *Client) change(ctx context.Context, method string, path []string, query, what string) error {
	r, err := c.servers.Ask(ctx, servers.Request{Method: method, Path: path, Query: query})
	if err == nil && r.Status != http.StatusOK && r.Status != http.StatusNoContent && r.Status != http.StatusNotFound {
		err = unexpected(what, r.Status)
	}
	return err
}

func unexpected(what string, status int) error {
	err := fmt.Errorf("the answer of Eureka is %d for: %s", status, what)
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		err = fmt.Errorf("%w (is the password right? A server may also refuse requests right after its start, until it has synced with the others)", err)
	case http.StatusNotFound:
		err = fmt.Errorf("%w (is the path right? Spring's is /eureka/, Netflix's own /eureka/v2/)", err)
	}
	return err
}

// appName returns a name in Eureka's canonical form.
func appName(service string) string { return strings.ToUpper(service) }

// The parts of Eureka's response in use. Older servers write numbers in quotes.
type (
	answer struct {
		Applications *struct {
			Application []struct {
				Name     string     `json:"name"`
				Instance []instance `json:"instance"`
			} `json:"application"`
		} `json:"applications"`
	}
	instance struct {
		ID       string         `json:"instanceId"`
		HostName string         `json:"hostName"`
		Address  string         `json:"ipAddr"`
		Status   string         `json:"status"`
		Port     port           `json:"port"`
		Secure   port           `json:"securePort"`
		Lease    leaseInfo      `json:"leaseInfo"`
		Metadata map[string]any `json:"metadata"`
		// Fields by which callers look up an instance, and URLs that they use besides its address.
		VIP        string `json:"vipAddress"`
		SecureVIP  string `json:"secureVipAddress"`
		HomePage   string `json:"homePageUrl"`
		StatusPage string `json:"statusPageUrl"`
		Health     string `json:"healthCheckUrl"`
	}
	port struct {
		Number  json.Number `json:"$"`
		Enabled any         `json:"@enabled"`
	}
	leaseInfo struct {
		Duration     json.Number `json:"durationInSecs"`
		Registration json.Number `json:"registrationTimestamp"`
		LastRenewal  json.Number `json:"lastRenewalTimestamp"`
	}
)

// parse parses Eureka's response to "apps". A response that is not Eureka's is an error, not an empty registry.
func parse(body []byte) ([]bridge.Service, error) {
	var a answer
	if err := json.Unmarshal(body, &a); err != nil {
		return nil, fmt.Errorf("parse Eureka's response: %w", err)
	}
	if a.Applications == nil {
		return nil, errors.New("the server is not Eureka: the response has no applications (is the path right?)")
	}
	var services []bridge.Service
	for _, app := range a.Applications.Application {
		s := bridge.Service{Name: app.Name}
		for _, i := range app.Instance {
			s.Instances = append(s.Instances, i.translate())
		}
		slices.SortFunc(s.Instances, func(a, b bridge.Instance) int { return strings.Compare(a.ID, b.ID) })
		services = append(services, s)
	}
	slices.SortFunc(services, func(a, b bridge.Service) int { return strings.Compare(a.Name, b.Name) })
	return services, nil
}

func (i instance) translate() bridge.Instance {
	out := bridge.Instance{ID: i.ID, Address: i.Address, State: bridge.Down, Renewed: i.Lease.renewed()}
	if out.ID == "" {
		out.ID = i.HostName // like Eureka's own InstanceInfo.getId
	}
	if out.Address == "" {
		out.Address = i.HostName
	}
	switch i.Status {
	case "UP":
		out.State = bridge.Up
	case "OUT_OF_SERVICE":
		out.State = bridge.OutOfService
	}
	switch {
	case i.Port.enabled():
		out.Port = number(i.Port.Number)
	case i.Secure.enabled():
		out.Port, out.TLS = number(i.Secure.Number), true
	}
	out.Version, _ = i.Metadata["version"].(string)
	out.Owner, _ = i.Metadata[ownerKey].(string)
	out.Shown = bridge.Advert{Service: i.VIP, ID: out.ID, Host: i.HostName, Address: cmp.Or(i.Address, "none"), Port: number(i.Port.Number), Owner: out.Owner, Besides: i.besides()}
	return out
}

// besides describes the fields of an instance that a registration does not set. Eureka adds the type of empty metadata.
func (i instance) besides() string {
	var also []string
	if !i.Port.enabled() {
		also = append(also, "port disabled")
	}
	if i.Secure.enabled() {
		also = append(also, "securePort enabled")
	}
	if i.SecureVIP != i.VIP {
		also = append(also, "secureVipAddress "+i.SecureVIP)
	}
	url := pageURL(i.HostName, number(i.Port.Number))
	for _, page := range []struct{ name, url string }{{"homePageUrl", i.HomePage}, {"statusPageUrl", i.StatusPage}, {"healthCheckUrl", i.Health}} {
		if page.url != url {
			also = append(also, page.name+" "+page.url)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(i.Metadata)) {
		if key != ownerKey && key != "@class" {
			also = append(also, "metadata "+key)
		}
	}
	return strings.Join(also, ", ")
}

func pageURL(host string, port int) string {
	return "http://" + net.JoinHostPort(host, strconv.Itoa(port)) + "/"
}

func (p port) enabled() bool { return fmt.Sprint(p.Enabled) == "true" }

func number(n json.Number) int {
	v, err := n.Int64()
	if err != nil {
		return 0
	}
	return int(v)
}

// renewed returns the time of the last heartbeat. After the first one, Eureka's "last renewal" is actually the end of the
// lease (com.netflix.eureka.lease.Lease.renew adds the duration, as its comment admits).
func (l leaseInfo) renewed() time.Time {
	last, registered := number(l.LastRenewal), number(l.Registration)
	if last == 0 {
		return time.Time{}
	}
	t := time.UnixMilli(int64(last)).UTC()
	if last > registered {
		t = t.Add(-time.Duration(number(l.Duration)) * time.Second)
	}
	return t
}

// registration encodes an instance like com.netflix.appinfo.InstanceInfo. The URLs are those that Spring's clients
// send; they are not called, as the mesh has its own health checks.
func registration(a bridge.Advert) map[string]any {
	url := pageURL(a.Host, a.Port)
	return map[string]any{
		"instanceId": a.ID, "app": appName(a.Service), "hostName": a.Host, "ipAddr": a.Address,
		"vipAddress": strings.ToLower(a.Service), "secureVipAddress": strings.ToLower(a.Service),
		"status":         string(bridge.Up),
		"port":           map[string]any{"$": a.Port, "@enabled": "true"},
		"securePort":     map[string]any{"$": 443, "@enabled": "false"},
		"dataCenterInfo": map[string]any{"@class": "com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo", "name": "MyOwn"},
		"leaseInfo": map[string]any{
			"renewalIntervalInSecs": int(renewEvery.Seconds()), "durationInSecs": int(lease.Seconds()),
		},
		"metadata":    map[string]any{ownerKey: a.Owner},
		"homePageUrl": url, "statusPageUrl": url, "healthCheckUrl": url,
	}
}
