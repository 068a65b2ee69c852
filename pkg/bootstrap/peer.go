package bootstrap

import "strings"

// Peer is a member of etcd for the others: its name, and its address, https://HOST:PORT.
type Peer struct {
	Name string `json:"name"`
	URL  string `json:"url"`
}

// Node returns the name of the node on which a member runs: that of the member without its random suffix.
func (p Peer) Node() string {
	if i := strings.LastIndexByte(p.Name, '-'); i >= 0 {
		return p.Name[:i]
	}
	return p.Name
}
