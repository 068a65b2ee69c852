// Package dialect lets Istio's control plane drive the upstream Envoy.
//
// Istio generates configuration for its own build of Envoy, which has extensions that upstream's has not. This package
// owns the translation: pure functions from proto to proto (Translator), and the wrapper that puts them around istiod's
// generators (Wrap). cmd/pilot-discovery calls Wrap; pkg/mesh/install gives istiod the environment that IstiodEnv names.
//
// What each private extension becomes, and what is lost, is in docs/mesh/dialect.md.
package dialect
