package install

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"istio.io/istio/operator/pkg/manifest"
	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/util/clog"
	"istio.io/istio/operator/pkg/values"
	"istio.io/istio/pkg/kube"
)

// settings are the inputs of an installation.
type settings struct {
	images  Images
	profile string
	// clusterDomain is the DNS domain of the cluster's services.
	clusterDomain string
}

func (s settings) sets() []string {
	sets := []string{"profile=" + s.profile, "hub=" + s.images.Hub, "tag=" + s.images.Tag}
	if s.clusterDomain != "" {
		sets = append(sets, "values.global.proxy.clusterDomain="+s.clusterDomain)
	}
	return sets
}

// input returns the names of the files with our values, which are valid until done is called.
func (s settings) input() (names []string, done func(), err error) {
	return Input(s.images, nil, s.sets(), strings.NewReader(""))
}

// identity returns the installation's identity. It is cheap: it merges values, and renders no chart.
func (s settings) identity() (Identity, error) {
	files, done, err := s.input()
	if err != nil {
		return Identity{}, err
	}
	defer done()
	merged, err := render.MergeInputs(files, s.sets(), nil)
	if err != nil {
		return Identity{}, fmt.Errorf("merge Istio's settings: %w", err)
	}
	sum := sha256.Sum256([]byte(merged.JSON()))
	return Identity{Version: s.images.Tag, Profile: s.profile, Values: hex.EncodeToString(sum[:8])}, nil
}

// manifests renders the charts with Istio's own renderer. The cluster's version comes from the client; without one the charts
// assume the oldest.
func (s settings) manifests(client kube.Client, log clog.Logger) ([]manifest.ManifestSet, values.Map, error) {
	files, done, err := s.input()
	if err != nil {
		return nil, nil, err
	}
	defer done()
	sets, merged, err := render.GenerateManifest(files, s.sets(), false, client, log)
	if err != nil {
		return nil, nil, fmt.Errorf("render Istio's charts, profile %s: %w", s.profile, err)
	}
	if err := adapt(sets); err != nil {
		return nil, nil, fmt.Errorf("adapt Istio's charts: %w", err)
	}
	return sets, merged, nil
}
