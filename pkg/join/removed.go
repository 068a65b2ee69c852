package join

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
)

// Kubernetes has no list of revoked certificates. A node's is void once its node has been removed: the record of its name says when, and
// the API server refuses certificates for the name that were made before. So a machine that was removed neither registers again nor
// renews its certificate, and whoever kept a certificate has nothing in common with the next machine of that name.

const (
	// knownTime is how long a node's request waits for the records, while its server starts.
	knownTime = 5 * time.Second
	// keptRecord is how long a removed node's record stays: longer than any certificate for it, also where the controller manager signs
	// for a year, upstream's default, in place of certificate.NodeLife.
	keptRecord = 366 * 24 * time.Hour
)

// records are the cluster's records and nodes, as this server knows them.
type records struct {
	client kubernetes.Interface
	// machines has ConfigMaps; nodes are reduced to what is used here.
	machines, nodes cache.Store
	known           chan struct{} // closed when machines is complete
}

func newRecords() *records {
	return &records{known: make(chan struct{})}
}

// follow keeps the records up to date until ctx ends.
func (r *records) follow(ctx context.Context, client kubernetes.Interface, log func(msg string, args ...any)) {
	r.client = client
	maps := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = recordLabel }))
	all := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(func(o any) (any, error) {
		if n, ok := o.(*corev1.Node); ok {
			return &corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion},
				Status:     corev1.NodeStatus{Addresses: n.Status.Addresses, Conditions: n.Status.Conditions},
			}, nil
		}
		return o, nil
	}))
	machines, nodes := maps.Core().V1().ConfigMaps().Informer(), all.Core().V1().Nodes().Informer()
	r.machines, r.nodes = machines.GetStore(), nodes.GetStore()
	changed := component.NewWake()
	for _, i := range []cache.SharedIndexInformer{machines, nodes} {
		_, _ = i.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { changed.Call() }, UpdateFunc: func(any, any) { changed.Call() }, DeleteFunc: func(any) { changed.Call() },
		})
	}
	maps.Start(ctx.Done())
	all.Start(ctx.Done())
	defer maps.Shutdown()
	defer all.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), machines.HasSynced) {
		return
	}
	close(r.known)
	if !cache.WaitForCacheSync(ctx.Done(), nodes.HasSynced) {
		return
	}
	update := func(ctx context.Context) {
		if err := r.update(ctx, time.Now(), log); err != nil && ctx.Err() == nil {
			log("the records of machines that have joined are not up to date", "err", err)
		}
	}
	update(ctx)
	component.Rounds(ctx, changed, recordInterval, update) // also without a change: what has failed, and old records
}

// update notes in the records which nodes have registered, and which were removed.
func (r *records) update(ctx context.Context, now time.Time, log func(string, ...any)) error {
	maps := r.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	var failures []error
	for _, o := range r.machines.List() {
		m, ok := o.(*corev1.ConfigMap)
		name := strings.TrimPrefix(m.GetName(), recordPrefix)
		if !ok || name == m.Name {
			continue
		}
		rec := readRecord(m)
		uid := r.uid(name)
		var err error
		switch {
		case rec.free() && now.Sub(rec.removed) > keptRecord:
			err = maps.Delete(ctx, m.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &m.UID, ResourceVersion: &m.ResourceVersion}})
		case rec.free():
		case rec.node == "" && uid != "":
			next := m.DeepCopy()
			next.Data[recordNode] = string(uid)
			_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
		case rec.node != "" && uid != rec.node:
			// The list of nodes may be older than the record.
			var n *corev1.Node
			n, err = r.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) || err == nil && n.UID != rec.node {
				if err = retire(ctx, r.client, m, now); err == nil {
					log("a node was removed: its certificates are no longer accepted", "node", name)
				}
			}
		}
		// Another server has done it, or does it with the next event.
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			failures = append(failures, fmt.Errorf("%s: %w", m.Name, err))
		}
	}
	return errors.Join(failures...)
}

// all returns the nodes.
func (r *records) all() (nodes []*corev1.Node) {
	select {
	case <-r.known:
	default:
		return nil
	}
	for _, o := range r.nodes.List() {
		if n, ok := o.(*corev1.Node); ok {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// uid is that of the node of a name, empty if there is none.
func (r *records) uid(name string) (uid types.UID) {
	if o, ok, err := r.nodes.GetByKey(name); err == nil && ok {
		if n, ok := o.(*corev1.Node); ok {
			return n.UID
		}
	}
	return ""
}

// Authenticator refuses certificates of nodes that were removed, which the API server's own authenticator accepts.
func (s *Server) Authenticator(next authenticator.Request) authenticator.Request {
	return authenticator.RequestFunc(func(req *http.Request) (*authenticator.Response, bool, error) {
		resp, ok, err := next.AuthenticateRequest(req)
		if err != nil || !ok || req.TLS == nil || len(req.TLS.PeerCertificates) == 0 {
			return resp, ok, err
		}
		cert := req.TLS.PeerCertificates[0]
		name, isNode := strings.CutPrefix(resp.User.GetName(), User(""))
		if !isNode || cert.Subject.CommonName != resp.User.GetName() {
			return resp, ok, err
		}
		ctx, cancel := context.WithTimeout(req.Context(), knownTime)
		defer cancel()
		select {
		case <-s.records.known:
		case <-ctx.Done():
			return nil, false, errors.New("the server does not know yet which nodes were removed")
		}
		if o, found, err := s.records.machines.GetByKey(metav1.NamespaceSystem + "/" + recordPrefix + name); err == nil && found {
			if m, ok := o.(*corev1.ConfigMap); ok && readRecord(m).void(cert) {
				return nil, false, nil // not an error, which the API server would log for each request
			}
		}
		return resp, ok, err
	})
}
