package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

const (
	// recordPrefix and the node's name are the name of a ConfigMap in kube-system: which machine has got a certificate for that name.
	// Nodes cannot write it, unlike their Lease.
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
	recordTime    = "time" // RFC 3339
)

// record keeps the name for the machine's key, so that no name is certified for two machines, on two servers either. The record goes
// with the node object. One without a node stays until an administrator removes it: the certificate is valid, whoever has it.
func record(ctx context.Context, client kubernetes.Interface, r Request, key *ecdsa.PublicKey, token string, v View) (*Refusal, error) {
	hash, err := hashOf(key)
	if err != nil {
		return nil, err
	}
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	for _, n := range v.Nodes {
		if n.Name == r.NodeName {
			// Its own, by Decide. The kubelet's key may have changed since it joined.
			return nil, forget(ctx, client, r.NodeName)
		}
	}
	unregistered, err := maps.List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
	if err != nil {
		return nil, err
	}
	count := 0
	for _, m := range unregistered.Items {
		if len(m.OwnerReferences) == 0 {
			count++
		}
	}
	_, err = maps.Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + r.NodeName, Labels: map[string]string{recordLabel: "true"}},
		Data: map[string]string{
			recordKey: hash, recordToken: token, recordAddress: r.NodeIP.String(), recordTime: v.Now.UTC().Format(time.RFC3339),
		},
	}, metav1.CreateOptions{})
	switch {
	case err == nil && count >= maxUnregistered:
		return refuse(http.StatusConflict, "%d machines have joined and not registered their nodes: revoke the token that they had, and remove their records with `polymesh kubectl delete configmap -n %s -l %s` on a server",
			count, metav1.NamespaceSystem, recordLabel), forget(ctx, client, r.NodeName)
	case err == nil:
		return nil, nil
	case !apierrors.IsAlreadyExists(err):
		return nil, err
	}
	have, err := maps.Get(ctx, recordPrefix+r.NodeName, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) || err == nil && len(have.OwnerReferences) > 0:
		return refuse(http.StatusServiceUnavailable, "a node with the name %s has just been removed: try again", r.NodeName), nil
	case err != nil:
		return nil, err
	case have.Data[recordKey] == hash:
		return nil, nil // the same machine, which was interrupted
	}
	return refuse(http.StatusConflict, "a machine at %.50q joined under the name %s on %.30q with %.60q, and has not registered its node. If it is this one, `polymesh kubectl delete configmap -n %s %s` on a server lets it join again; if not, give this one another name with --node-name: that machine's certificate is valid",
		have.Data[recordAddress], r.NodeName, have.Data[recordTime], have.Data[recordToken], metav1.NamespaceSystem, have.Name), nil
}

// forget removes the record of a name, if there is one.
func forget(ctx context.Context, client kubernetes.Interface, node string) error {
	err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Delete(ctx, recordPrefix+node, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// ownRecords makes the nodes that have registered the owners of their records. It reports whether records are left without a node.
func ownRecords(ctx context.Context, client kubernetes.Interface) (left bool, err error) {
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	records, err := maps.List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
	if err != nil {
		return true, fmt.Errorf("list the records of machines that have joined: %w", err)
	}
	unowned := slices.DeleteFunc(records.Items, func(m corev1.ConfigMap) bool { return len(m.OwnerReferences) > 0 })
	if len(unowned) == 0 {
		return false, nil
	}
	// From the API server's cache: someone may leave hundreds of records without a node.
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return true, fmt.Errorf("list the nodes: %w", err)
	}
	uids := map[string]types.UID{}
	for _, n := range nodes.Items {
		uids[recordPrefix+n.Name] = n.UID
	}
	for _, m := range unowned {
		uid, ok := uids[m.Name]
		if !ok {
			left = true
			continue
		}
		m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: m.Name[len(recordPrefix):], UID: uid}}
		if _, err := maps.Update(ctx, &m, metav1.UpdateOptions{}); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return true, err
		}
	}
	return left, nil
}

func hashOf(key *ecdsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
