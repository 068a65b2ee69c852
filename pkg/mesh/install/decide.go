package install

import (
	"fmt"
	"strings"
)

// Identity identifies what an installation consists of. If it differs from the recorded one, there is something to upgrade.
type Identity struct {
	// Version is the tag of the images, which names Istio's version and charts.
	Version string `json:"version"`
	// Profile is Istio's installation profile.
	Profile string `json:"profile"`
	// Values is the hash of all settings that the charts are rendered with.
	Values string `json:"values"`
}

// Owner is whose Istio runs on the cluster.
type Owner string

const (
	// Ours was installed by the server.
	Ours Owner = "polymesh"
	// Users was there before the server's first start; the server never changes it.
	Users Owner = "user"
)

// Phase is the progress of an installation.
type Phase string

const (
	// Installing is written before the first object is applied.
	Installing Phase = "installing"
	// Installed is written after the last one.
	Installed Phase = "installed"
)

// Record is the server's record of its installation, in the cluster.
type Record struct {
	Owner Owner
	Phase Phase
	Identity
	// Objects are fingerprints of what was applied, by objectKey.
	Objects map[string]string
	// Shared are the keys of applied objects that have no fingerprint: webhooks, to which istiod writes too, and CRDs.
	Shared []string
	// IngressClass is set when the class was created; it is not created a second time.
	IngressClass bool
	// GatewayAPI is the bundle of Gateway API's CRDs that the server applied, also with a user's Istio.
	GatewayAPI string
	// Telemetry is the resource that the server applied for the whole mesh.
	Telemetry TelemetryRecord
}

// Observed is the state of the cluster that the decision depends on.
type Observed struct {
	// Record is nil before the first decision.
	Record *Record
	// Present are the parts of any Istio in the cluster: control planes, injection webhooks, CRDs.
	Present []string
	// Foreign are control planes that are not in the record.
	Foreign []string
	// Gone is true if the record has a control plane and the cluster does not.
	Gone bool
	// Changed are recorded objects that a user changed, replaced or deleted.
	Changed []string
}

// Action is what the server does about Istio when it starts.
type Action string

const (
	Install Action = "install" // nothing was there
	Finish  Action = "finish"  // an installation was interrupted
	Upgrade Action = "upgrade" // ours, unchanged, and this build or its settings differ
	Keep    Action = "keep"    // ours, as recorded
	Leave   Action = "leave"   // the user's
)

// Decision is an action and its reason.
type Decision struct {
	Action Action
	Reason string
}

const byHand = "`polymesh istioctl install` installs or upgrades by hand"

// Decide is the complete rule of when the server changes Istio: it installs it if there is none, finishes its own installation, and
// upgrades only what it installed itself and no one has changed.
func Decide(o Observed, want Identity) Decision {
	r := o.Record
	switch {
	case r == nil && len(o.Present) == 0:
		return Decision{Install, "there is no Istio"}
	case r == nil:
		return Decision{Leave, fmt.Sprintf("there was an Istio before the server came (%s)", list(o.Present))}
	case r.Owner != Ours:
		return Decision{Leave, "it is the user's own"}
	case r.Phase != Installed && len(o.Foreign) > 0:
		return Decision{Leave, fmt.Sprintf("the user installed a control plane (%s); %s", list(o.Foreign), byHand)}
	case r.Phase != Installed:
		return Decision{Finish, "the installation was interrupted"}
	case o.Gone:
		return Decision{Leave, "the user uninstalled it; " + byHand}
	case r.Identity == want:
		return Decision{Keep, "it is as installed"}
	case len(o.Foreign) > 0:
		return Decision{Leave, fmt.Sprintf("the user installed a control plane (%s); %s", list(o.Foreign), byHand)}
	case len(o.Changed) > 0:
		return Decision{Leave, fmt.Sprintf("the user changed it (%s); %s", list(o.Changed), byHand)}
	default:
		return Decision{Upgrade, fmt.Sprintf("from %s, profile %s, to %s, profile %s", r.Version, r.Profile, want.Version, want.Profile)}
	}
}

// list returns the first few names and the number of the others.
func list(s []string) string {
	const few = 3
	if len(s) <= few {
		return strings.Join(s, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(s[:few], ", "), len(s)-few)
}
