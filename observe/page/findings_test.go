package page

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/findings"
)

// The newest survey counts, as a whole, and not for long.
func TestDiagnosisAtATime(t *testing.T) {
	s := newStores(t)
	at := fixtureNow
	crash := findings.Finding{Reason: "Crash", Kind: "Deployment", Namespace: "shop", Name: "api", Message: "x"}
	node := findings.Finding{Reason: "NodeNotReady", Kind: "Node", Name: "n1", Message: "y", Bad: true}
	require.NoError(t, s.logs.Append((&findings.Survey{Findings: []findings.Finding{crash, node}, More: 3}).Entries(at)))
	require.NoError(t, s.logs.Append((&findings.Survey{Findings: []findings.Finding{crash}}).Entries(at.Add(time.Minute))))
	require.NoError(t, s.logs.Append((&findings.Survey{}).Entries(at.Add(2*time.Minute))))
	s.logs.Flush()
	p := &server{Options: Options{Logs: s.logs}}
	for after, want := range map[time.Duration]diagnosis{
		-time.Second:     {},
		time.Second:      {known: true, all: []findings.Finding{node, crash}, more: 3},
		59 * time.Second: {known: true, all: []findings.Finding{node, crash}, more: 3},
		61 * time.Second: {known: true, all: []findings.Finding{crash}},
		3 * time.Minute:  {known: true},
		2*time.Minute + diagnosisAge + time.Second: {},
	} {
		got, err := p.diagnosisAt(t.Context(), at.Add(after))
		require.NoError(t, err)
		got.made = time.Time{}
		require.Equal(t, want, *got, after)
	}
	require.Len(t, (&diagnosis{all: []findings.Finding{crash, node}}).of(objectKey{"shop", "Deployment", "api"}), 1)
	require.Empty(t, (&diagnosis{all: []findings.Finding{crash}}).of(objectKey{"shop", "StatefulSet", "api"}))
}

func TestStatementsOfADiagnosis(t *testing.T) {
	since := fixtureNow.Add(-time.Minute)
	d := &diagnosis{known: true, all: []findings.Finding{
		{Reason: "NodeNotReady", Kind: "Node", Name: "n1", Message: "Kubelet stopped posting node status.", Advice: "start it", Since: since, Bad: true},
		{Reason: "Refused", Kind: "Deployment", Namespace: "shop", Name: "api", Message: "exceeded quota: small", Advice: "raise it", Since: since, Bad: true, Replicas: 1},
		{Reason: "OutOfMemory", Kind: "Deployment", Namespace: "shop", Name: "api", Container: "app", Pod: "api-1", Message: "killed", Bad: true, Replicas: 1},
		{Reason: "NodePressure", Kind: "Node", Name: "n2", Message: "kubelet has disk pressure", Advice: "free space"},
		{Reason: "InjectionMissing", Kind: "DaemonSet", Namespace: "shop", Name: "agent", Pod: "agent-1", Message: "the pod has no sidecar", Advice: "restart it", Ready: 2, Replicas: 2},
		{Reason: "Cluster", Kind: "Cluster", Message: "the certificate x of node n1 expires in 5d"},
		{Reason: "Cluster", Kind: "Cluster", Message: "1 of 3 servers is away: n2"},
		{Reason: "Invented", Kind: "Pod", Namespace: "other", Name: `<b>"&`, Message: "registry.example.com/x:1: not found"},
	}}
	want := []statement{
		{Level: bad, Text: "Node n1 is not ready.", Why: "Kubelet stopped posting node status.", Advice: "Start it.", Since: since.UnixMilli(), Link: "/nodes"},
		{Level: bad, Text: "api in shop: 0 of 1 pod is ready: no pod can be created.", Why: "Exceeded quota: small.", Advice: "Raise it.", Since: since.UnixMilli(), Link: "/workloads/shop/api"},
		{Level: warn, Text: "Node n2 is under pressure.", Why: "Kubelet has disk pressure.", Advice: "Free space.", Link: "/nodes"},
		{Level: warn, Text: "agent in shop: a pod has no sidecar.", Why: "Pod agent-1: the pod has no sidecar.", Advice: "Restart it.", Link: "/workloads/shop/agent"},
		{Level: warn, Text: "The certificate x of node n1 expires in 5d."},
		{Level: warn, Text: "1 of 3 servers is away: n2."},
		{Level: warn, Text: `<b>"& in other: it is not ready.`, Why: "registry.example.com/x:1: not found.", Link: "/workloads/other/%3Cb%3E%22&"},
	}
	require.Equal(t, want, d.statements(nil))
	require.Equal(t, want[:6], d.statements([]string{"shop"}), "nodes and servers belong to all namespaces")

	d = &diagnosis{known: true, made: fixtureNow, all: []findings.Finding{
		{Reason: "Crash", Kind: "Deployment", Namespace: "shop", Name: "api", Container: "app", Pod: "api-1", Message: "ended with exit code 3", Bad: true, Replicas: 1, Checked: fixtureNow.Add(-31 * time.Second)},
		{Reason: "Undetermined", Kind: "Deployment", Namespace: "shop", Name: "late", Message: "there was no time to find out why", Replicas: 1},
		{Reason: "Deleting", Kind: "Namespace", Namespace: "shop", Name: "shop", Message: "some content has finalizers remaining", Since: since, Bad: true},
		{Reason: "Deleting", Kind: "Deployment", Namespace: "shop", Name: "old", Message: "it was deleted and still exists, held by its finalizers: a/b"},
		{Reason: "Deleting", Kind: "Deployment", Namespace: "shop", Name: "web", Pod: "web-1", Message: "it was deleted and still exists"},
	}}
	require.Equal(t, []statement{
		{Level: bad, Text: "api in shop: 0 of 1 pod is ready: container app ends again and again.", Why: "Container app of pod api-1: ended with exit code 3. It could not be checked again for 31s: the cluster answers too slowly.", Link: "/workloads/shop/api"},
		{Level: warn, Text: "late in shop: 0 of 1 pod is ready: why is not known yet.", Why: "There was no time to find out why.", Link: "/workloads/shop/late"},
		{Level: bad, Text: "Namespace shop was deleted and still exists.", Why: "Some content has finalizers remaining.", Since: since.UnixMilli()},
		{Level: warn, Text: "old in shop: it was deleted and still exists.", Why: "It was deleted and still exists, held by its finalizers: a/b.", Link: "/workloads/shop/old"},
		{Level: warn, Text: "web in shop: a pod is not removed.", Why: "Pod web-1: it was deleted and still exists.", Link: "/workloads/shop/web"},
	}, d.statements([]string{"shop"}))
	require.Empty(t, d.statements([]string{"other"}), "a namespace belongs to itself")

	many := &diagnosis{more: 5}
	for _, name := range strings.Fields("a b c d e f g h i j") {
		many.all = append(many.all, findings.Finding{Kind: "Deployment", Namespace: "shop", Name: name})
	}
	list := many.statements(nil)
	require.Len(t, list, maxStatements+1)
	require.Equal(t, "7 more objects have problems.", list[maxStatements].Text)
}

func TestSentence(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "killed at its limit": "Killed at its limit.", "Done!": "Done!", "a.b/c: not found": "a.b/c: not found.", "écrit": "Écrit.", "`kubectl get`": "`kubectl get`.", "x": "X.",
	} {
		require.Equal(t, want, sentence(text))
	}
}
