package member

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
)

// A record is a Secret of a type of our own in kube-system, with nothing secret: it decides which member is removed, and neither nodes nor
// istiod may write Secrets there, unlike ConfigMaps (TestJoin in pkg/join, writers). It has no owner: it must outlive the node.
const (
	recordType corev1.SecretType = "polymesh.dev/etcd-member"
	// recordPrefix and the member's id are the name of a record.
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

// Records returns the records of all members. Secrets that a server has not written in this form are left out.
func Records(ctx context.Context, client kubernetes.Interface) ([]Record, error) {
	list, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(recordType)})
	if err != nil {
		return nil, fmt.Errorf("list the records of etcd's members: %w", err)
	}
	var records []Record
	for _, s := range list.Items {
		text, ok := strings.CutPrefix(s.Name, recordPrefix)
		id, err := strconv.ParseUint(text, 16, 64)
		if !ok || err != nil || len(s.Data[recordNode]) == 0 || len(s.Data[recordUID]) == 0 {
			continue
		}
		records = append(records, Record{ID: id, Node: string(s.Data[recordNode]), UID: types.UID(s.Data[recordUID])})
	}
	return records, nil
}

// write writes the record of a server's own member. A version before has kept it in a ConfigMap, which is never read: each server writes its
// record when it starts.
func write(ctx context.Context, client kubernetes.Interface, r Record) error {
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	want := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + memberID(r.ID), Labels: map[string]string{recordLabel: "true"}},
		Type:       recordType,
		Data:       map[string][]byte{recordNode: []byte(r.Node), recordUID: []byte(r.UID)},
	}
	_, err := secrets.Update(ctx, want, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = secrets.Create(ctx, want, metav1.CreateOptions{})
	}
	return err
}

// forgetFormer removes the ConfigMaps of a version before, of members that have a record now, or exist no more; nil members are not known. A
// server of that version that still leads etcd then leaves those members alone. It returns how many ConfigMaps stay.
func forgetFormer(ctx context.Context, client kubernetes.Interface, members []etcd.Member, records []Record) (stay int, err error) {
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	former, err := maps.List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
	if err != nil {
		return 0, fmt.Errorf("list the former records of etcd's members: %w", err)
	}
	for _, m := range former.Items {
		text, ok := strings.CutPrefix(m.Name, recordPrefix)
		id, err := strconv.ParseUint(text, 16, 64)
		if !ok || err != nil {
			continue
		}
		gone := members != nil && !slices.ContainsFunc(members, func(m etcd.Member) bool { return m.ID == id })
		if !gone && !slices.ContainsFunc(records, func(r Record) bool { return r.ID == id }) {
			stay++
			continue
		}
		if err := maps.Delete(ctx, m.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &m.UID}}); err != nil && !apierrors.IsNotFound(err) {
			return 0, fmt.Errorf("remove the former record %s: %w", m.Name, err)
		}
	}
	return stay, nil
}

func forget(ctx context.Context, client kubernetes.Interface, r Record) error {
	err := client.CoreV1().Secrets(metav1.NamespaceSystem).Delete(ctx, recordPrefix+memberID(r.ID), metav1.DeleteOptions{})
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
