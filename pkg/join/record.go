package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// A record is a Secret of a type of our own in kube-system: which machine has got a certificate for a node's name, or is the server of that
// name, and since when earlier certificates for it are void. It has nothing secret. It decides whom the API server believes, and fewer parties
// may write Secrets than ConfigMaps: neither nodes nor istiod can (TestJoin, writers). The type of a Secret cannot be changed.
const (
	recordType corev1.SecretType = "polymesh.dev/joined-machine"
	// recordPrefix and the node's name are the name of a record.
	recordPrefix = "joined."
	recordLabel  = "join.polymesh.dev/record"
	// maxUnregistered is how many machines may have joined without a node: more are someone who tries names.
	maxUnregistered = 500
)

// Keys of a record.
const (
	recordRole    = "role" // a token.Role; none is an agent
	recordKey     = "key"  // SHA-256 of the public key with which it joined; none for a server
	recordToken   = "token"
	recordAddress = "address"
	recordTime    = "time"    // when it joined, RFC 3339
	recordNode    = "node"    // UID of the node that has registered
	recordRemoved = "removed" // when that node, or one of the name before, was removed, RFC 3339: certificates made before are void
	recordLeft    = "left"    // when the node of a server was removed: see retire
	recordSelf    = "self"    // set by a server itself, when it runs
)

// machineRecord is a record with what is read from it. Damaged times are zero: the name is taken, and nothing void.
type machineRecord struct {
	*corev1.Secret
	role                  token.Role
	joined, removed, left time.Time
	node                  types.UID
	self                  bool
}

func readRecord(s *corev1.Secret) *machineRecord {
	r := &machineRecord{Secret: s, role: token.Agent, node: types.UID(s.Data[recordNode]), self: len(s.Data[recordSelf]) > 0}
	if token.Role(s.Data[recordRole]) == token.Server {
		r.role = token.Server
	}
	for key, to := range map[string]*time.Time{recordTime: &r.joined, recordRemoved: &r.removed, recordLeft: &r.left} {
		*to, _ = time.Parse(time.RFC3339Nano, string(s.Data[key]))
	}
	return r
}

// gone is when the name became free the last time; zero for never.
func (r *machineRecord) gone() time.Time {
	if r.left.After(r.removed) {
		return r.left
	}
	return r.removed
}

// free reports whether the name can be certified for another machine: the one that joined has been removed since.
func (r *machineRecord) free() bool { return !r.gone().IsZero() && !r.joined.After(r.gone()) }

// void reports whether a certificate is not one of the machine that has the name. While no agent has it, each is void, whenever it was made:
// what a removed node had requested may have been signed after the removal.
func (r *machineRecord) void(c *x509.Certificate) bool {
	return r.role == token.Agent && r.free() || c.NotBefore.Add(certificate.NodeBackdate).Before(r.removed)
}

// removal is how long a name stays taken after a removal: the times in certificates have full seconds.
const removal = time.Second

// joins is who joins, for record.
type joins struct {
	role token.Role
	// key is an agent's; nil for a server, which makes its certificates itself.
	key   *ecdsa.PublicKey
	token string
	// at is when its certificate is made, by take.
	at time.Time
}

// take gives the name to a machine that joins: it vacates the name if it is free, and records it. It returns when the machine's certificate is
// made.
func take(ctx context.Context, client kubernetes.Interface, r Request, who joins, v View) (made time.Time, refused *Refusal, err error) {
	if who.at, err = vacate(ctx, client, r.NodeName, v); err == nil {
		refused, err = record(ctx, client, r, who, v)
	}
	return who.at, refused, err
}

func stamp(t time.Time) []byte { return []byte(t.UTC().Format(time.RFC3339Nano)) }

// record keeps the name for the machine's key, so that no name is certified for two machines, on two servers either. One without a node
// stays until an administrator removes it: the certificate is valid, whoever has it.
func record(ctx context.Context, client kubernetes.Interface, r Request, who joins, v View) (*Refusal, error) {
	hash := ""
	if who.key != nil {
		var err error
		if hash, err = hashOf(who.key); err != nil {
			return nil, err
		}
	}
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	next := newRecord(r.NodeName, who.role, who.at)
	next.Data[recordKey], next.Data[recordToken], next.Data[recordAddress] = []byte(hash), []byte(who.token), []byte(r.NodeIP.String())
	for _, n := range v.Nodes {
		if n.Name == r.NodeName {
			next.Data[recordNode] = []byte(n.UID) // its own, by Decide
		}
	}
	was := v.Record
	if was == nil {
		all, err := list(ctx, client)
		if err != nil {
			return nil, err
		}
		count := 0
		for _, r := range all {
			if r.node == "" && !r.free() {
				count++
			}
		}
		if count >= maxUnregistered {
			return refuse(http.StatusConflict, "%d machines have joined and not registered their nodes: revoke the token that they had, and remove their records with `polymesh kubectl delete secret -n %s -l %s` on a server",
				count, metav1.NamespaceSystem, recordLabel), nil
		}
		_, err = secrets.Create(ctx, next, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return refuse(http.StatusServiceUnavailable, "another machine joins under the name %s at this moment: try again", r.NodeName), nil
		}
		return nil, err
	}
	switch {
	case was.free() && v.Now.Before(was.gone().Add(removal)):
		return refuse(http.StatusServiceUnavailable, "a node with the name %s has just been removed: try again", r.NodeName), nil
	case was.free(), next.Data[recordNode] != nil:
	case was.node != "":
		return refuse(http.StatusServiceUnavailable, "a node with the name %s has just been removed: try again", r.NodeName), nil
	case was.role == token.Server && who.role == token.Server && !was.self:
		// A server that was interrupted, or did not get further. It has no certificate by this, and could make any.
	case was.role == token.Agent && who.role == token.Agent && string(was.Data[recordKey]) == hash:
		return nil, nil // the same machine, which was interrupted
	default:
		return refuse(http.StatusConflict, "%s at %.50q joined under the name %s on %.30q with %.60q, and has not registered its node. If it is this one, `polymesh kubectl delete secret -n %s %s` on a server lets it join again; if not, give this one another name with --node-name: that machine's certificate is valid",
			map[token.Role]string{token.Agent: "a machine", token.Server: "a server"}[was.role], was.Data[recordAddress], r.NodeName, was.Data[recordTime], was.Data[recordToken], metav1.NamespaceSystem, was.Name), nil
	}
	gone := was.gone()
	if was.free() && (was.role == token.Agent || who.role == token.Agent) {
		// What was made after the removal is void too. A server makes its certificates itself, by its own clock.
		before := who.at.Add(-1)
		if who.role == token.Server {
			before = who.at.Add(-MaxSkew)
		}
		if before.After(gone) {
			gone = before
		}
	}
	if !gone.IsZero() {
		next.Data[recordRemoved] = stamp(gone)
	}
	next.ResourceVersion = was.ResourceVersion
	_, err := secrets.Update(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return refuse(http.StatusServiceUnavailable, "another machine joins under the name %s at this moment: try again", r.NodeName), nil
	}
	return nil, err
}

func newRecord(node string, role token.Role, now time.Time) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + node, Labels: map[string]string{recordLabel: "true"}},
		Type:       recordType,
		Data:       map[string][]byte{recordRole: []byte(role), recordTime: stamp(now)},
	}
}

// list returns all records.
func list(ctx context.Context, client kubernetes.Interface) (records []*machineRecord, err error) {
	all, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(recordType)})
	if err != nil {
		return nil, fmt.Errorf("list the records of machines that have joined: %w", err)
	}
	for _, s := range all.Items {
		if strings.HasPrefix(s.Name, recordPrefix) {
			records = append(records, readRecord(&s))
		}
	}
	return records, nil
}

// Addresses returns the addresses with which machines have joined, by the names of their nodes. A server has checked that they were no other
// node's.
func Addresses(ctx context.Context, client kubernetes.Interface) (map[string]netip.Addr, error) {
	records, err := list(ctx, client)
	if err != nil {
		return nil, err
	}
	addresses := map[string]netip.Addr{}
	for _, r := range records {
		if a, err := netip.ParseAddr(string(r.Data[recordAddress])); err == nil && r.node != "" && !r.free() {
			addresses[strings.TrimPrefix(r.Name, recordPrefix)] = a
		}
	}
	return addresses, nil
}

// recordOf returns the record of a node's name, nil if there is none.
func recordOf(ctx context.Context, client kubernetes.Interface, node string) (*machineRecord, error) {
	s, err := client.CoreV1().Secrets(metav1.NamespaceSystem).Get(ctx, recordPrefix+node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("look for the record of %s: %w", node, err)
	case s.Type != recordType:
		return nil, fmt.Errorf("the Secret %s in %s is not a record of a machine, and has its name: remove it", s.Name, s.Namespace)
	}
	return readRecord(s), nil
}

// NameTakenError means that the name of this server's node is another machine's.
type NameTakenError struct{ message string }

func (err *NameTakenError) Error() string { return err.message }

// recordServer records this server under its node's name, as machines that join are recorded. The error is a NameTakenError if an agent has a
// certificate for the name: it would be the server's node, too.
func recordServer(ctx context.Context, client kubernetes.Interface, node string, address netip.Addr, now time.Time) error {
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	was, err := recordOf(ctx, client, node)
	if err != nil {
		return err
	}
	next := newRecord(node, token.Server, now)
	next.Data[recordAddress], next.Data[recordSelf] = []byte(address.String()), []byte("true")
	registered, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	switch {
	case err == nil:
		next.Data[recordNode] = []byte(registered.UID)
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("look for node %s: %w", node, err)
	}
	if was == nil {
		_, err = secrets.Create(ctx, next, metav1.CreateOptions{})
		return err
	}
	// A node cannot give itself the label of servers.
	_, serves := registered.GetLabels()[layout.ServerLabel]
	switch {
	case was.role == token.Server && !was.free() && was.self:
		return nil
	case was.role == token.Server:
	case !was.free() && (was.node == "" || was.node != registered.GetUID() || !serves):
		return &NameTakenError{fmt.Sprintf("an agent at %.50q joined under the name %s of this server on %.30q: give this server another name with --node-name. `polymesh node remove %s` removes that agent, there or on another server",
			was.Data[recordAddress], node, was.Data[recordTime], node)}
	}
	if was.role == token.Agent && was.free() { // what one has requested must not be signed for a server's name
		if err := deleteRequests(ctx, client, node); err != nil {
			return err
		}
	}
	// What the name's agents have had stays void.
	if !was.removed.IsZero() {
		next.Data[recordRemoved] = stamp(was.removed)
	}
	next.ResourceVersion = was.ResourceVersion
	_, err = secrets.Update(ctx, next, metav1.UpdateOptions{})
	return err
}

// retire makes a name free, and all certificates for it that have been made void. Those of a server stay valid until another machine has the
// name: it has the authority that signs them, and a server that still runs registers its node again when it starts.
func retire(ctx context.Context, client kubernetes.Interface, r *machineRecord, now time.Time) error {
	key := recordRemoved
	if r.role == token.Server {
		key = recordLeft
	}
	if now.Before(r.joined) {
		now = r.joined // see vacate
	}
	return r.set(ctx, client, key, stamp(now))
}

// set writes a key of a record that has not changed since it was read.
func (r *machineRecord) set(ctx context.Context, client kubernetes.Interface, key string, value []byte) error {
	next := r.DeepCopy()
	if next.Data == nil {
		next.Data = map[string][]byte{}
	}
	next.Data[key] = value
	_, err := client.CoreV1().Secrets(metav1.NamespaceSystem).Update(ctx, next, metav1.UpdateOptions{})
	return err
}

// retireName is retire for the node of a name that leaves. What it has requested is not signed any more.
func retireName(ctx context.Context, client kubernetes.Interface, node string, now time.Time) error {
	for {
		r, err := recordOf(ctx, client, node)
		if r == nil {
			return err
		}
		if err = retire(ctx, client, r, now); err == nil {
			return deleteRequests(ctx, client, node)
		} else if !apierrors.IsConflict(err) {
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
