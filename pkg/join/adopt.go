package join

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// Versions before kept the records in ConfigMaps of the same names, which istiod and others may write too. They are read while the servers are
// upgraded, and never again.

// adoptedName is the Secret that says that all servers keep records in Secrets.
const adoptedName = "joined-machines"

// adopt takes over the records of a version before. It is complete once each server of the cluster has recorded itself, which servers of that
// version do not do; then their ConfigMaps are removed. Until then it is called again: machines may join by those servers. It reports whether all
// records of now are taken over, also with an error: a full datastore must not keep a server whose cluster has none from accepting nodes.
func (r *records) adopt(ctx context.Context) (taken bool, err error) {
	if r.settled {
		return true, nil
	}
	secrets, maps := r.client.CoreV1().Secrets(metav1.NamespaceSystem), r.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	switch mark, err := secrets.Get(ctx, adoptedName, metav1.GetOptions{}); {
	case err == nil && mark.Type == recordType:
		r.settled = true
		r.behind.Store(nil)
		return true, nil
	case err != nil && !apierrors.IsNotFound(err):
		return false, fmt.Errorf("look for the records of a version before: %w", err)
	}
	// Before the ConfigMaps: what a server of that version has written until it was stopped is in them.
	behind, err := serversBehind(ctx, r.client)
	if err != nil {
		return false, err
	}
	old, err := maps.List(ctx, metav1.ListOptions{LabelSelector: recordLabel})
	if err != nil {
		return false, fmt.Errorf("read the records of a version before: %w", err)
	}
	for _, m := range old.Items {
		if err := adoptOne(ctx, r.client, &m, time.Now()); err != nil {
			return false, fmt.Errorf("take over the record %s of a version before: %w", m.Name, err)
		}
	}
	if others := slices.DeleteFunc(slices.Clone(behind), func(n string) bool { return n == r.self }); len(others) > 0 {
		note := fmt.Sprintf("servers of a version before run, or have not started with this one yet (%s): until they do, records of machines are read from ConfigMaps too, which more accounts may write than Secrets. If a machine is lost, `polymesh node remove` its node",
			strings.Join(others, ", "))
		r.behind.Store(&note)
	}
	if len(behind) > 0 {
		return true, nil
	}
	for _, m := range old.Items {
		if !strings.HasPrefix(m.Name, recordPrefix) {
			continue
		}
		err := maps.Delete(ctx, m.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &m.UID, ResourceVersion: &m.ResourceVersion}})
		if err != nil && !apierrors.IsNotFound(err) {
			return true, fmt.Errorf("remove the record %s of a version before: %w", m.Name, err)
		}
	}
	_, err = secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: adoptedName}, Type: recordType}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return true, fmt.Errorf("note that all records are taken over: %w", err)
	}
	r.settled = true
	r.behind.Store(nil)
	return true, nil
}

// adoptOne writes a record as it is in a ConfigMap, unless there is one that is as new.
func adoptOne(ctx context.Context, client kubernetes.Interface, m *corev1.ConfigMap, now time.Time) error {
	node, ok := strings.CutPrefix(m.Name, recordPrefix)
	if !ok {
		return nil
	}
	next := newRecord(node, token.Agent, time.Time{})
	for _, key := range []string{recordKey, recordToken, recordAddress, recordTime, recordNode, recordRemoved} {
		delete(next.Data, key)
		if text, ok := m.Data[key]; ok {
			next.Data[key] = []byte(text)
		}
		// A time to come would make all certificates for the name void until then.
		if at, err := time.Parse(time.RFC3339Nano, m.Data[key]); err == nil && at.After(now.Add(MaxSkew)) {
			delete(next.Data, key)
		}
	}
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	was, err := recordOf(ctx, client, node)
	if err != nil {
		return err
	}
	if was == nil {
		_, err = secrets.Create(ctx, next, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return errors.New("another server writes it")
		}
		return err
	}
	is := readRecord(next)
	switch {
	case was.free() && is.joined.After(was.gone()):
		// A machine has joined by the other server since.
		if was.gone().After(is.removed) {
			next.Data[recordRemoved] = stamp(was.gone())
		}
		next.ResourceVersion = was.ResourceVersion
		_, err = secrets.Update(ctx, next, metav1.UpdateOptions{})
	case was.role == token.Agent && is.removed.After(was.removed) && !was.joined.After(is.removed):
		// A node has left by the other server since.
		err = retire(ctx, client, was, is.removed)
	}
	return err
}

// serversBehind returns the servers that have not recorded themselves, by name.
func serversBehind(ctx context.Context, client kubernetes.Interface) ([]string, error) {
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: layout.ServerLabel})
	if err != nil {
		return nil, fmt.Errorf("list the servers: %w", err)
	}
	records, err := list(ctx, client)
	if err != nil {
		return nil, err
	}
	var behind []string
	for _, n := range nodes.Items {
		recorded := slices.ContainsFunc(records, func(r *machineRecord) bool {
			return r.Name == recordPrefix+n.Name && r.self
		})
		if !recorded {
			behind = append(behind, n.Name)
		}
	}
	return behind, nil
}
