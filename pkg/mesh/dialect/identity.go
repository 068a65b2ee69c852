package dialect

import (
	"bytes"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfig "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	ssl "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
)

// identityFilter closes connections of callers whose certificate has more than one URI. Envoy's principal rules match any of them,
// so such a caller would have several identities at once. istiod signs no such certificate, and the SPIFFE standard forbids it
// (https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md, section 5.2). But an earlier Polymesh could be tricked into signing
// one, which stays valid until it expires, and an external CA may sign anything.
const identityFilter = "polymesh.identity"

// meshRoot is the name of the root certificates with which a listener verifies callers from the mesh
// (istio.io/istio/pilot/pkg/security/model/authentication.go, SDSRootResourceName). Servers that require certificates of other
// authorities have their own rules.
var meshRoot = []byte("ROOTCA")

// oneIdentity adds the filter as the first one of each inbound chain that requires certificates of the mesh.
func oneIdentity(s *surroundings, e *edits, from, to int) error {
	chain := e.in[from:to]
	first, ok := firstValue(chain, chainFilters)
	if !s.inbound || !ok || string(valueAt(first, filterName)) == identityFilter || !bytes.Contains(valueAt(chain, chainTransportSocket), meshRoot) {
		return nil
	}
	e.change(from, 0, s.parts.oneIdentity)
	return nil
}

// oneIdentityFilter returns the encoded filter for a chain. Several URIs are joined by commas (Envoy source/common/ssl/matching/inputs.h).
func oneIdentityFilter() []byte {
	act := func(name string, action rbacconfig.RBAC_Action) *matcher.Matcher_OnMatch {
		return &matcher.Matcher_OnMatch{OnMatch: &matcher.Matcher_OnMatch_Action{Action: &xdscore.TypedExtensionConfig{
			Name: "action", TypedConfig: mustPack(&rbacconfig.Action{Name: name, Action: action}),
		}}}
	}
	config := &rbac.RBAC{StatPrefix: "caller_identity.", Matcher: &matcher.Matcher{
		MatcherType: &matcher.Matcher_MatcherList_{MatcherList: &matcher.Matcher_MatcherList{Matchers: []*matcher.Matcher_MatcherList_FieldMatcher{{
			Predicate: &matcher.Matcher_MatcherList_Predicate{MatchType: &matcher.Matcher_MatcherList_Predicate_SinglePredicate_{
				SinglePredicate: &matcher.Matcher_MatcherList_Predicate_SinglePredicate{
					Input: &xdscore.TypedExtensionConfig{Name: "uris", TypedConfig: mustPack(&ssl.UriSanInput{})},
					Matcher: &matcher.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{
						ValueMatch: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Contains{Contains: ","}},
					},
				},
			}},
			OnMatch: act("several identities", rbacconfig.RBAC_DENY),
		}}}},
		OnNoMatch: act("one identity", rbacconfig.RBAC_ALLOW),
	}}
	return appendBytes(nil, chainFilters, mustPack(&listener.Filter{
		Name: identityFilter, ConfigType: &listener.Filter_TypedConfig{TypedConfig: mustPack(config)},
	}).Value)
}
