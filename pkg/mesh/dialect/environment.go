package dialect

// IstiodEnv returns the environment that istiod should run with when its proxies are upstream Envoys. None of it is needed for
// correctness, because the dialect removes the same things from the resources: it saves work in istiod and the dialect. The
// installer's overlay of Helm values sets it (values.pilot.env); Istio reads it when the process starts.
func IstiodEnv() map[string]string {
	return map[string]string{
		// istio.metadata_exchange and the peer metadata filters have no upstream counterpart.
		"PILOT_ENABLE_METADATA_EXCHANGE": "false",
	}
}
