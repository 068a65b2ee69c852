// Package dialect lets Istio's control plane configure upstream Envoy.
//
// Istio generates configuration for its own build of Envoy, which has extensions that upstream Envoy lacks. This package
// owns the translation: pure functions from proto to proto (Translator), and the wrapper around istiod's
// generators (Wrap). cmd/pilot-discovery calls Wrap; pkg/mesh/install sets the environment from IstiodEnv for istiod.
//
// docs/mesh/dialect.md lists what each private extension becomes, and what is lost.
package dialect
