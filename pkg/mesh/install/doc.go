// Package mesh installs Istio on the node's own cluster and keeps what it installed up to date.
//
// It owns the overlay of values that Istio needs with Polymesh's images, the decision whether to install, upgrade or
// leave alone, and the record of what was installed. Charts, profiles, rendering, webhooks and pruning are Istio's own
// installer (istio.io/istio/operator). pkg/command adds the component to a server; pkg/mesh/istioctl puts the same overlay
// below a user's own `istioctl install`. The semantics are written down in docs/mesh/install.md.
package install
