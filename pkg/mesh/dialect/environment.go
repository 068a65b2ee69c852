package dialect

// IstiodEnv is environment that istiod should run with when its proxies are upstream Envoys. None of it is needed for
// correctness: the dialect takes the same things out of the resources. It saves istiod and the dialect the work. The
// installer's overlay of Helm values sets it (values.pilot.env); Istio reads it when the process starts.
func IstiodEnv() map[string]string {
	return map[string]string{
		// istio.metadata_exchange and the peer metadata filters have no upstream counterpart.
		"PILOT_ENABLE_METADATA_EXCHANGE": "false",
	}
}
