package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/certificate"
)

const (
	// recordPrefix and the node's name are the name of a ConfigMap in kube-system: which machine has got a certificate for that name, and
	// since when earlier certificates for it are void. Nodes cannot write it, unlike their Lease.
	recordPrefix = "joined."
	recordLabel  = "join.polymesh.dev/record"
	// maxUnregistered is how many machines may have joined without a node: more are someone who tries names.
	maxUnregistered = 500
)

// Keys of a record.
const (
	recordKey     = "key" // SHA-256 of the machine's public key
	recordToken   = "token"
	recordAddress = "address"
	recordTime    = "time"    // when it joined, RFC 3339
	recordNode    = "node"    // UID of the node that has registered
	recordRemoved = "removed" // when that node, or one of the name before, was removed, RFC 3339: certificates made before are void
)

// machineRecord is a record, as far as it is read. Damaged times are zero: the name is taken, and nothing void.
type machineRecord struct {
	joined, removed time.Time
	node            types.UID
}

func readRecord(m *corev1.ConfigMap) machineRecord {
	r := machineRecord{node: types.UID(m.Data[recordNode])}
	r.joined, _ = time.Parse(time.RFC3339Nano, m.Data[recordTime])
	r.removed, _ = time.Parse(time.RFC3339Nano, m.Data[recordRemoved])
	return r
}

// free reports whether the name can be certified for another machine: the one that joined has been removed since.
func (r machineRecord) free() bool { return !r.removed.IsZero() && !r.joined.After(r.removed) }

// void reports whether a certificate was made before the name's node was removed.
func (r machineRecord) void(c *x509.Certificate) bool {
	return c.NotBefore.Add(certificate.NodeBackdate).Before(r.removed)
}

// removal is how long a name stays taken after a removal: the times in certificates have full seconds.
const removal = time.Second

// record keeps the name for the machine's key, so that no name is certified for two machines, on two servers either. One without a node
// stays until an administrator removes it: the certificate is valid, whoever has it.
func record(ctx context.Context, client kubernetes.Interface, r Request, key *ecdsa.PublicKey, token string, v View) (*Refusal, error) {
	hash, err := hashOf(key)
	if err != nil {
		return nil, err
	}
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	next := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + r.NodeName, Labels: map[string]string{recordLabel: "true"}},
		Data: map[string]string{
			recordKey: hash, recordToken: token, recordAddress: r.NodeIP.String(), recordTime: v.Now.UTC().Format(time.RFC3339Nano),
		},
	}
	for _, n := range v.Nodes {
		if n.Name == r.NodeName {
			next.Data[recordNode] = string(n.UID) // its own, by Decide
		}
	}
	have := v.Record
	if have == nil {
		unregistered, err := maps.List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
		if err != nil {
			return nil, err
		}
		count := 0
		for _, m := range unregistered.Items {
			if r := readRecord(&m); r.node == "" && !r.free() {
				count++
			}
		}
		if count >= maxUnregistered {
			return refuse(http.StatusConflict, "%d machines have joined and not registered their nodes: revoke the token that they had, and remove their records with `polymesh kubectl delete configmap -n %s -l %s` on a server",
				count, metav1.NamespaceSystem, recordLabel), nil
		}
		_, err = maps.Create(ctx, next, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return refuse(http.StatusServiceUnavailable, "another machine joins under the name %s at this moment: try again", r.NodeName), nil
		}
		return nil, err
	}
	was := readRecord(have)
	switch {
	case was.free() && v.Now.Before(was.removed.Add(removal)):
		return refuse(http.StatusServiceUnavailable, "a node with the name %s has just been removed: try again", r.NodeName), nil
	case was.free(), next.Data[recordNode] != "":
	case was.node != "":
		return refuse(http.StatusServiceUnavailable, "a node with the name %s has just been removed: try again", r.NodeName), nil
	case have.Data[recordKey] == hash:
		return nil, nil // the same machine, which was interrupted
	default:
		return refuse(http.StatusConflict, "a machine at %.50q joined under the name %s on %.30q with %.60q, and has not registered its node. If it is this one, `polymesh kubectl delete configmap -n %s %s` on a server lets it join again; if not, give this one another name with --node-name: that machine's certificate is valid",
			have.Data[recordAddress], r.NodeName, have.Data[recordTime], have.Data[recordToken], metav1.NamespaceSystem, have.Name), nil
	}
	if !was.removed.IsZero() {
		next.Data[recordRemoved] = have.Data[recordRemoved]
	}
	next.ResourceVersion = have.ResourceVersion
	_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return refuse(http.StatusServiceUnavailable, "another machine joins under the name %s at this moment: try again", r.NodeName), nil
	}
	return nil, err
}

// retire makes a name free, and all certificates for it that have been made void.
func retire(ctx context.Context, client kubernetes.Interface, m *corev1.ConfigMap, now time.Time) error {
	m = m.DeepCopy()
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	m.Data[recordRemoved] = now.UTC().Format(time.RFC3339Nano)
	_, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Update(ctx, m, metav1.UpdateOptions{})
	return err
}

// retireName is retire for the node of a name that leaves.
func retireName(ctx context.Context, client kubernetes.Interface, node string, now time.Time) error {
	for {
		m, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, recordPrefix+node, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil // a server's own node
		}
		if err == nil {
			err = retire(ctx, client, m, now)
		}
		if !apierrors.IsConflict(err) {
			return err
		}
	}
}

func hashOf(key *ecdsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
