// Package install installs Istio on the server's own cluster and keeps what it installed up to date.
//
// It owns the overlay of values that Istio needs with Polymesh's images, the decision whether to install, upgrade or do nothing,
// and the record of what was installed. Charts, profiles, rendering, webhooks and pruning are those of Istio's own installer
// (istio.io/istio/operator). pkg/server adds the component to a server; pkg/mesh/istioctl uses the same overlay for a user's own
// `istioctl install`. The semantics are documented in docs/mesh/install.md.
package install
