package join

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/token"
)

// Kubernetes has no list of revoked certificates. A node's is void once its node has been removed: the record of its name says when, and
// the API server refuses certificates for the name that were made before. So a machine that was removed neither registers again nor
// renews its certificate, and whoever kept a certificate has nothing in common with the next machine of that name.

const (
	// knownTime is how long a node's request waits for the records, while its server starts.
	knownTime = 5 * time.Second
	// podsTime is how long a removed node's certificate may stay valid while its pods are deleted.
	podsTime = 5 * time.Second
	// keptRecord is how long a removed node's record stays: longer than any certificate for it, also where the controller manager signs
	// for a year, upstream's default, in place of certificate.NodeLife.
	keptRecord = 366 * 24 * time.Hour
)

// records are the cluster's records and nodes, as this server knows them.
type records struct {
	// self is the name of this server's node.
	self   string
	client kubernetes.Interface
	// machines has a machineRecord for each Secret of the type; nodes are reduced to what is used here.
	machines, nodes cache.Store
	adopted         chan struct{} // closed when the records of a version before are taken over for the first time
	known           chan struct{} // closed when machines is complete
	// settled is set when there is nothing more to take over: see adopt.
	settled bool
	// behind is about servers of a version before, nil for none.
	behind atomic.Pointer[string]
}

func newRecords(self string) *records {
	return &records{self: self, adopted: make(chan struct{}), known: make(chan struct{})}
}

// follow keeps the records up to date until ctx ends.
func (r *records) follow(ctx context.Context, client kubernetes.Interface, log func(msg string, args ...any)) {
	r.client = client
	for why := ""; ; {
		taken, err := r.adopt(ctx)
		if taken {
			break
		}
		if text := err.Error(); text != why && ctx.Err() == nil {
			log("the records of machines that have joined cannot be read yet", "err", text)
			why = text
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
	}
	close(r.adopted)
	secrets := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.FieldSelector = "type=" + string(recordType) }),
		// Read once, and not for each request of a node.
		informers.WithTransform(func(o any) (any, error) {
			if s, ok := o.(*corev1.Secret); ok {
				return readRecord(s), nil
			}
			return o, nil
		}))
	all := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(func(o any) (any, error) {
		if n, ok := o.(*corev1.Node); ok {
			return &corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion},
				Status:     corev1.NodeStatus{Addresses: n.Status.Addresses, Conditions: n.Status.Conditions},
			}, nil
		}
		return o, nil
	}))
	machines, nodes := secrets.Core().V1().Secrets().Informer(), all.Core().V1().Nodes().Informer()
	r.machines, r.nodes = machines.GetStore(), nodes.GetStore()
	changed := component.NewWake()
	for _, i := range []cache.SharedIndexInformer{machines, nodes} {
		_, _ = i.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { changed.Call() }, UpdateFunc: func(any, any) { changed.Call() }, DeleteFunc: func(any) { changed.Call() },
		})
	}
	secrets.Start(ctx.Done())
	all.Start(ctx.Done())
	defer secrets.Shutdown()
	defer all.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), machines.HasSynced) {
		return
	}
	close(r.known)
	if !cache.WaitForCacheSync(ctx.Done(), nodes.HasSynced) {
		return
	}
	update := func(ctx context.Context) {
		_, err := r.adopt(ctx)
		if err := errors.Join(err, r.update(ctx, time.Now(), log)); err != nil && ctx.Err() == nil {
			log("the records of machines that have joined are not up to date", "err", err)
		}
	}
	update(ctx)
	component.Rounds(ctx, changed, recordInterval, update) // also without a change: what has failed, and old records
}

// update notes in the records which nodes have registered, and which were removed.
func (r *records) update(ctx context.Context, now time.Time, log func(string, ...any)) error {
	secrets := r.client.CoreV1().Secrets(metav1.NamespaceSystem)
	var failures []error
	for _, o := range r.machines.List() {
		rec, ok := o.(*machineRecord)
		if !ok {
			continue
		}
		name, ok := strings.CutPrefix(rec.Name, recordPrefix)
		if !ok {
			continue
		}
		uid := r.uid(name)
		var err error
		switch {
		case rec.free() && now.Sub(rec.gone()) > keptRecord:
			err = secrets.Delete(ctx, rec.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &rec.UID, ResourceVersion: &rec.ResourceVersion}})
		case rec.free():
		case uid != "" && uid != rec.node && (rec.node == "" || name == r.self && rec.role == token.Server):
			err = rec.set(ctx, r.client, recordNode, []byte(uid))
		case name == r.self && rec.role == token.Server: // it runs, and registers its node again
		case rec.node != "" && uid != rec.node:
			// The list of nodes may be older than the record.
			var n *corev1.Node
			n, err = r.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) || err == nil && n.UID != rec.node {
				// The list of records may be older than that: the name may be another machine's, with pods of its own.
				var live *corev1.Secret
				if live, err = secrets.Get(ctx, rec.Name, metav1.GetOptions{}); err != nil || live.ResourceVersion != rec.ResourceVersion {
					break
				}
				if err := deletePods(ctx, r.client, name); err != nil {
					failures = append(failures, err)
				}
				if err = retire(ctx, r.client, rec, now); err == nil {
					if err := deleteRequests(ctx, r.client, name); err != nil {
						failures = append(failures, err)
					}
					log("a node was removed: its name is free, and certificates of an agent are no longer accepted", "node", name)
				}
			}
		}
		// Another server has done it, or does it with the next event.
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			failures = append(failures, fmt.Errorf("%s: %w", rec.Name, err))
		}
	}
	return errors.Join(failures...)
}

// deletePods deletes the pods of a node that was removed. Kubernetes does that 40 seconds later, if there is no node of the name then: one that
// has joined again in between would keep pods whose addresses are those of its former range, which other nodes cannot reach. What is left
// after podsTime is left to Kubernetes: the node's certificate must not stay valid because of a webhook.
func deletePods(ctx context.Context, client kubernetes.Interface, node string) error {
	ctx, cancel := context.WithTimeout(ctx, podsTime)
	defer cancel()
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", node).String()})
	if err != nil {
		return fmt.Errorf("list the pods of node %s, which was removed: %w", node, err)
	}
	var failures []error
	now := int64(0)
	for _, p := range pods.Items {
		err := client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: metav1.NewUIDPreconditions(string(p.UID))})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			failures = append(failures, fmt.Errorf("delete pod %s/%s of node %s, which was removed: %w", p.Namespace, p.Name, node, err))
		}
	}
	return errors.Join(failures...)
}

// vacate makes a name that is free ready for another machine, and returns when that one's certificate is made: what the former one has
// requested is not signed any more, and what it has got was made earlier. The times in certificates have full seconds.
func vacate(ctx context.Context, client kubernetes.Interface, name string, v View) (time.Time, error) {
	switch rec := v.Record; {
	case rec != nil && rec.free():
	case rec != nil && rec.joined.After(v.Now): // a moment ago
		return rec.joined, nil
	default:
		return v.Now, nil
	}
	if err := deleteRequests(ctx, client, name); err != nil {
		return time.Time{}, err
	}
	return time.Now().Truncate(time.Second).Add(time.Second), nil
}

// requestsTime is how long the requests of one removed node may delay others. What is left is deleted before its name is given again.
const requestsTime = 10 * time.Second

// requestsPage is how many signing requests are read at a time, parallelDeletes how many are deleted.
const requestsPage, parallelDeletes = 500, 16

// deleteRequests deletes the signing requests of a node that was removed: they would be approved and signed as if it were still there, or,
// those for serving, when the next machine of that name has the addresses in them.
func deleteRequests(ctx context.Context, client kubernetes.Interface, node string) error {
	ctx, cancel := context.WithTimeout(ctx, requestsTime)
	defer cancel()
	requests := client.CertificatesV1().CertificateSigningRequests()
	var g errgroup.Group
	g.SetLimit(parallelDeletes)
	for page := (metav1.ListOptions{Limit: requestsPage}); ; {
		list, err := requests.List(ctx, page)
		if err != nil {
			return errors.Join(fmt.Errorf("list the signing requests of node %s, which was removed: %w", node, err), g.Wait())
		}
		for _, r := range list.Items {
			if r.Spec.Username != User(node) {
				continue
			}
			g.Go(func() error {
				err := requests.Delete(ctx, r.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(r.UID))})
				if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
					return fmt.Errorf("delete signing request %s of node %s, which was removed: %w", r.Name, node, err)
				}
				return nil
			})
		}
		if page.Continue = list.Continue; page.Continue == "" {
			return g.Wait()
		}
	}
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

// claimedNode returns the name of the node that a client's certificate is for, whoever has signed it.
func claimedNode(req *http.Request) (name string, cert *x509.Certificate, ok bool) {
	if req.TLS == nil || len(req.TLS.PeerCertificates) == 0 {
		return "", nil, false
	}
	cert = req.TLS.PeerCertificates[0]
	name, ok = strings.CutPrefix(cert.Subject.CommonName, User(""))
	return name, cert, ok
}

// Filter is put around the API server's whole chain of handlers: while this server does not know the records yet, it can decide about no
// node's certificate, and neither the tokens nor the roles may be known. It answers 503 then, as 401 would mean that the node was removed.
func (s *Server) Filter(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, _, node := claimedNode(req); (node || strings.HasPrefix(req.URL.Path, pathPrefix)) && !s.records.wait(req.Context()) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Retry-After", "1")
			status := apierrors.NewServiceUnavailable("the server is starting: try again").Status()
			status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
			w.WriteHeader(http.StatusServiceUnavailable)
			_ = json.NewEncoder(w).Encode(status)
			return
		}
		next.ServeHTTP(w, req)
	})
}

// wait waits until the records are known, for at most knownTime.
func (r *records) wait(ctx context.Context) bool {
	select {
	case <-r.known:
		return true
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, knownTime)
	defer cancel()
	select {
	case <-r.known:
		return true
	case <-ctx.Done():
		return false
	}
}

// Authenticator refuses certificates of nodes that were removed, which the API server's own authenticator accepts.
func (s *Server) Authenticator(next authenticator.Request) authenticator.Request {
	return authenticator.RequestFunc(func(req *http.Request) (*authenticator.Response, bool, error) {
		resp, ok, err := next.AuthenticateRequest(req)
		name, cert, isNode := claimedNode(req)
		if err != nil || !ok || !isNode || resp.User.GetName() != User(name) {
			return resp, ok, err
		}
		select {
		case <-s.records.known:
		default: // Filter does not let it come to this
			return nil, false, errors.New("the server does not know yet which nodes were removed")
		}
		if o, found, err := s.records.machines.GetByKey(metav1.NamespaceSystem + "/" + recordPrefix + name); err == nil && found {
			if m, ok := o.(*machineRecord); ok && m.void(cert) {
				return nil, false, nil // not an error, which the API server would log for each request
			}
		}
		return resp, ok, err
	})
}
