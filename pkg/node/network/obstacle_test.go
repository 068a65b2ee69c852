package network

import (
	"reflect"
	"testing"
)

// Output of nft 1.1, `nft list chains ip`, after K3s was stopped, on a machine with Docker.
const chainsOfOthers = `table ip filter {
	chain KUBE-ROUTER-FORWARD {
	}
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
	}
	chain INPUT {
		type filter hook input priority filter; policy drop;
	}
}
table ip kube-proxy {
	chain filter-forward {
		type filter hook forward priority -110; policy accept;
	}
}
`

func TestReadChains(t *testing.T) {
	k3s, drops := readChains(chainsOfOthers)
	if want := []chain{{"filter", "FORWARD"}}; !k3s || !reflect.DeepEqual(drops, want) {
		t.Errorf("got %v, %v", k3s, drops)
	}
	if k3s, drops := readChains("table ip kube-proxy {\n\tchain services {\n\t}\n}\n"); k3s || drops != nil {
		t.Errorf("in kube-proxy's own: %v, %v", k3s, drops)
	}
	for rules, want := range map[string]bool{
		"\t\tip saddr 172.17.0.0/16 accept\n": false,
		"\t\tip saddr 10.42.0.0/16 accept\n":  true,
		"\t\tiifname \"cni0\" accept\n":       true,
		"":                                    false,
	} {
		if got := letsThrough(rules, "10.42.0.0/24"); got != want {
			t.Errorf("%q: %v", rules, got)
		}
	}
}
