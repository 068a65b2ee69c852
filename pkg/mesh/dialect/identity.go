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

// identityFilter closes connections of callers whose certificate is for more than one URI. Envoy's rules about principals look for any
// of them, so such a caller would be several at once. istiod signs no such certificate, and the standard for SVIDs forbids it
// (https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md, section 5.2); an earlier Polymesh could be brought to sign one, which
// stays valid for as long as it says, and what an outside CA of the mesh signs is not ours to know.
const identityFilter = "polymesh.identity"

// meshRoot is the name of the roots by which a listener knows callers of the mesh
// (istio.io/istio/pilot/pkg/security/model/authentication.go, SDSRootResourceName). A server that asks for certificates of other
// authorities has rules of its own.
var meshRoot = []byte("ROOTCA")

// oneIdentity puts the filter before all others of a chain for traffic to the workload that asks for the mesh's certificates.
func oneIdentity(s *surroundings, e *edits, from, to int) error {
	chain := e.in[from:to]
	first, ok := first(chain, chainFilters)
	if !s.inbound || !ok || string(at(first, filterName)) == identityFilter || !bytes.Contains(at(chain, chainTransportSocket), meshRoot) {
		return nil
	}
	e.change(from, 0, s.parts.oneIdentity)
	return nil
}

// oneIdentityFilter is the filter, encoded, as a chain has it. A list of URIs has commas (Envoy source/common/ssl/matching/inputs.h).
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
