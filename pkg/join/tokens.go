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
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"

	"polymesh.dev/polymesh/pkg/token"
)

// AgentGroup is the group of requests with an agent's token. Its only right is to join (pkg/controlplane).
const AgentGroup = "system:bootstrappers:polymesh:agent"

// ServerGroup is the group of requests with a server's token, in addition: it may join as a server.
const ServerGroup = "system:bootstrappers:polymesh:server"

// nodeTokenLabel marks the token of <data-dir>/server/node-token, serverTokenLabel that of <data-dir>/server/token.
const (
	nodeTokenLabel   = "join.polymesh.dev/node-token"
	serverTokenLabel = "join.polymesh.dev/server-token"
)

// maxDescription is the length of a description, in bytes.
const maxDescription = 200

// TokenOptions describe a new token.
type TokenOptions struct {
	// Role is what machines become with it; empty for agents.
	Role token.Role
	// TTL is how long it can be used; 0 means for ever.
	TTL         time.Duration
	Description string
}

// TokenInfo is a token without its secret.
type TokenInfo struct {
	ID          string     `json:"id"`
	Role        token.Role `json:"role"`
	Description string     `json:"description,omitempty"`
	// Expires is nil if the token does not expire.
	Expires *time.Time `json:"expires,omitempty"`
	Created time.Time  `json:"created"`
}

// Expired reports whether the API server rejects the token at the time now, by its rule
// (plugin/pkg/auth/authenticator/token/bootstrap). The token cleaner then removes it.
func (i TokenInfo) Expired(now time.Time) bool { return i.Expires != nil && !now.Before(*i.Expires) }

// CreateToken makes a token. caHash is Token.CAHash. share lets the holder of a server's token open what the servers share
// (bootstrap.Store.Allow).
func CreateToken(ctx context.Context, client kubernetes.Interface, caHash string, o TokenOptions, share func(context.Context, token.Token) error) (token.Token, error) {
	if o.TTL < 0 {
		return token.Token{}, fmt.Errorf("create a token: a token cannot expire before it exists: give a positive time, or 0 for no end")
	}
	if len(o.Description) > maxDescription {
		return token.Token{}, fmt.Errorf("create a token: the description has %d bytes, and %d are the limit", len(o.Description), maxDescription)
	}
	t, err := token.New(caHash, o.Role)
	if err != nil {
		return token.Token{}, fmt.Errorf("create a token: %w", err)
	}
	if err := register(ctx, client, t, o, share, nil); err != nil {
		return token.Token{}, err
	}
	return t, nil
}

// register lets the cluster accept a token.
func register(ctx context.Context, client kubernetes.Interface, t token.Token, o TokenOptions, share func(context.Context, token.Token) error, labels map[string]string) error {
	data := map[string]string{
		bootstrapapi.BootstrapTokenIDKey:               t.ID,
		bootstrapapi.BootstrapTokenSecretKey:           t.BootstrapSecret(),
		bootstrapapi.BootstrapTokenUsageAuthentication: "true",
		bootstrapapi.BootstrapTokenExtraGroupsKey:      AgentGroup,
	}
	if t.Role() == token.Server {
		data[bootstrapapi.BootstrapTokenExtraGroupsKey] = AgentGroup + "," + ServerGroup
	}
	if o.Description != "" {
		data[bootstrapapi.BootstrapTokenDescriptionKey] = o.Description
	}
	if o.TTL > 0 {
		data[bootstrapapi.BootstrapTokenExpirationKey] = time.Now().Add(o.TTL).UTC().Format(time.RFC3339)
	}
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	created, err := secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: bootstrapapi.BootstrapTokenSecretPrefix + t.ID, Labels: labels},
		Type:       bootstrapapi.SecretTypeBootstrapToken,
		StringData: data,
	}, metav1.CreateOptions{})
	if err == nil && t.Role() == token.Server {
		if err = share(ctx, t); err != nil {
			err = errors.Join(err, secrets.Delete(ctx, created.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &created.UID}}))
		}
	}
	if err != nil {
		return fmt.Errorf("create a token: %w", err)
	}
	return nil
}

// ListTokens returns the tokens with which machines can join, in the order of their creation. Bootstrap tokens of others, kubeadm for
// example, are not listed.
func ListTokens(ctx context.Context, client kubernetes.Interface) ([]TokenInfo, error) {
	secrets, err := tokenSecrets(ctx, client, "")
	if err != nil {
		return nil, err
	}
	infos := []TokenInfo{}
	for _, s := range secrets {
		infos = append(infos, info(&s))
	}
	slices.SortFunc(infos, func(a, b TokenInfo) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return infos, nil
}

func tokenSecrets(ctx context.Context, client kubernetes.Interface, selector string) ([]corev1.Secret, error) {
	secrets, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{
		FieldSelector: "type=" + string(bootstrapapi.SecretTypeBootstrapToken), LabelSelector: selector,
	})
	if err != nil {
		return nil, fmt.Errorf("list the tokens: %w", err)
	}
	return slices.DeleteFunc(secrets.Items, func(s corev1.Secret) bool { return !ours(&s) }), nil
}

// ours reports whether machines can join with a token: whoever makes a Secret chooses its content.
func ours(s *corev1.Secret) bool {
	return s.Name == bootstrapapi.BootstrapTokenSecretPrefix+string(s.Data[bootstrapapi.BootstrapTokenIDKey]) && slices.Contains(groups(s), AgentGroup)
}

func groups(s *corev1.Secret) []string {
	return strings.Split(string(s.Data[bootstrapapi.BootstrapTokenExtraGroupsKey]), ",")
}

func info(s *corev1.Secret) TokenInfo {
	i := TokenInfo{
		ID: string(s.Data[bootstrapapi.BootstrapTokenIDKey]), Role: token.Agent,
		Description: string(s.Data[bootstrapapi.BootstrapTokenDescriptionKey]), Created: s.CreationTimestamp.Time,
	}
	if slices.Contains(groups(s), ServerGroup) {
		i.Role = token.Server
	}
	if text := string(s.Data[bootstrapapi.BootstrapTokenExpirationKey]); text != "" {
		// One that cannot be read has expired for the API server (GetExpiration in k8s.io/cluster-bootstrap).
		expires, _ := time.Parse(time.RFC3339, text)
		i.Expires = &expires
	}
	return i
}

// ErrUnknownToken means that there is no such token.
var ErrUnknownToken = errors.New("there is no such token: `polymesh token list` shows those that exist")

// RevokeTokens removes tokens, given by id or as the whole token, and returns those that it has removed. Nodes that have joined with one
// stay. An unknown token does not keep the others.
func RevokeTokens(ctx context.Context, client kubernetes.Interface, texts ...string) (revoked []TokenInfo, err error) {
	var failed []error
	for _, text := range texts {
		t, err := revokeToken(ctx, client, text)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		revoked = append(revoked, t)
	}
	return revoked, errors.Join(failed...)
}

func revokeToken(ctx context.Context, client kubernetes.Interface, text string) (TokenInfo, error) {
	id := strings.TrimSpace(text)
	if t, err := token.Parse(text); err == nil {
		id = t.ID
	}
	if !token.ValidID(id) {
		return TokenInfo{}, errors.New("revoke a token: give its id, which has 6 letters or digits, or the whole token")
	}
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	s, err := secrets.Get(ctx, bootstrapapi.BootstrapTokenSecretPrefix+id, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && !ours(s) {
		return TokenInfo{}, fmt.Errorf("revoke token %s: %w", id, ErrUnknownToken)
	}
	if err != nil {
		return TokenInfo{}, fmt.Errorf("revoke token %s: %w", id, err)
	}
	if err := secrets.Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.UID}}); err != nil {
		return TokenInfo{}, fmt.Errorf("revoke token %s: %w", id, err)
	}
	return info(s), nil
}

// nodeToken returns the cluster's token without an end, for <data-dir>/server/node-token. It is made if there is none and create
// is set. ok is false if there is none.
func nodeToken(ctx context.Context, client kubernetes.Interface, caHash string, makeOne bool) (t token.Token, ok bool, err error) {
	secrets, err := tokenSecrets(ctx, client, nodeTokenLabel)
	if err != nil {
		return token.Token{}, false, err
	}
	// Two servers that started at the same time may have made one each: all use the same.
	slices.SortFunc(secrets, func(a, b corev1.Secret) int { return strings.Compare(a.Name, b.Name) })
	for _, s := range secrets {
		t := token.Token{CAHash: caHash, ID: string(s.Data[bootstrapapi.BootstrapTokenIDKey]), Secret: string(s.Data[bootstrapapi.BootstrapTokenSecretKey])}
		if _, err := token.Parse(t.String()); err == nil && !info(&s).Expired(time.Now()) {
			return t, true, nil
		}
	}
	if !makeOne {
		return token.Token{}, false, nil
	}
	if t, err = token.New(caHash, token.Agent); err == nil {
		err = register(ctx, client, t, TokenOptions{Description: "server/node-token"}, nil, map[string]string{nodeTokenLabel: "true"})
	}
	return t, err == nil, err
}
