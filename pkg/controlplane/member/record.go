package member

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
)

const (
	// recordPrefix and the member's id are the name of a ConfigMap in kube-system. Nodes cannot write it. It has no owner: it must
	// outlive the node.
	recordPrefix = "etcd-member."
	recordLabel  = "etcd.polymesh.dev/member"
	recordNode   = "node"
	recordUID    = "uid"
)

// Record is which node a member of etcd belongs to, as its server has written it.
type Record struct {
	// ID is the member's.
	ID uint64
	// Node and UID are the node's name and UID: a node that registers again under its name is another one.
	Node string
	UID  types.UID
}

// memberID is an id as etcd's own tools show it.
func memberID(id uint64) string { return strconv.FormatUint(id, 16) }

// Records returns the records of all members. ConfigMaps that a server has not written in this form are left out.
func Records(ctx context.Context, client kubernetes.Interface) ([]Record, error) {
	list, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
	if err != nil {
		return nil, fmt.Errorf("list the records of etcd's members: %w", err)
	}
	var records []Record
	for _, m := range list.Items {
		text, ok := strings.CutPrefix(m.Name, recordPrefix)
		id, err := strconv.ParseUint(text, 16, 64)
		if !ok || err != nil || m.Data[recordNode] == "" || m.Data[recordUID] == "" {
			continue
		}
		records = append(records, Record{ID: id, Node: m.Data[recordNode], UID: types.UID(m.Data[recordUID])})
	}
	return records, nil
}

func write(ctx context.Context, client kubernetes.Interface, r Record) error {
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	want := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + memberID(r.ID), Labels: map[string]string{recordLabel: "true"}},
		Data:       map[string]string{recordNode: r.Node, recordUID: string(r.UID)},
	}
	_, err := maps.Update(ctx, want, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = maps.Create(ctx, want, metav1.CreateOptions{})
	}
	return err
}

func forget(ctx context.Context, client kubernetes.Interface, r Record) error {
	err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Delete(ctx, recordPrefix+memberID(r.ID), metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// compare returns the records of members whose nodes do not exist any more, and those of members that do not. nodes has the UID of
// each node. A member without a record stays: it may be joining.
func compare(members []etcd.Member, records []Record, nodes map[string]types.UID) (orphans, stale []Record) {
	exists := map[uint64]bool{}
	for _, m := range members {
		exists[m.ID] = true
	}
	for _, r := range records {
		switch {
		case !exists[r.ID]:
			stale = append(stale, r)
		case nodes[r.Node] != r.UID:
			orphans = append(orphans, r)
		}
	}
	return orphans, stale
}

// Of returns the member of a node, by its record. ok is false if it has none, and for an agent.
func Of(members []etcd.Member, records []Record, node *corev1.Node) (m etcd.Member, ok bool) {
	for _, r := range records {
		if r.Node != node.Name || r.UID != node.UID {
			continue
		}
		for _, m := range members {
			if m.ID == r.ID {
				return m, true
			}
		}
	}
	return etcd.Member{}, false
}
