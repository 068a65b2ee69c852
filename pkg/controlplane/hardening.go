package controlplane

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	apiserver "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/audit/policy"
	eventratelimit "k8s.io/kubernetes/plugin/pkg/admission/eventratelimit/apis/eventratelimit/v1alpha1"
	podsecurity "k8s.io/pod-security-admission/admission/api/v1"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/config"
)

// auditPolicy is the default policy.
//
//go:embed audit-policy.yaml
var auditPolicy []byte

// Retention of the audit log, in days, files and megabytes: the values of the CIS benchmark (1.2.17 to 1.2.19).
const (
	auditMaxAge    = "30"
	auditMaxBackup = "10"
	auditMaxSize   = "100"
)

// hardening returns the API server's flags for the audit log and for Pod Security.
func hardening(cfg *config.Server) map[string]string {
	flags := map[string]string{}
	if cfg.AuditLog {
		flags["audit-log-path"] = cfg.DataDir.Server("logs", "audit.log")
		flags["audit-log-maxage"] = auditMaxAge
		flags["audit-log-maxbackup"] = auditMaxBackup
		flags["audit-log-maxsize"] = auditMaxSize
		flags["audit-policy-file"] = auditPolicyFile(cfg)
	}
	if admissionNeeded(cfg) {
		flags["admission-control-config-file"] = admissionFile(cfg)
	}
	return flags
}

func admissionNeeded(cfg *config.Server) bool {
	return cfg.PodSecurity != config.PodSecurityLevels()[0]
}

func admissionFile(cfg *config.Server) string { return cfg.DataDir.Server("etc", "admission.yaml") }

func auditPolicyFile(cfg *config.Server) string {
	if cfg.AuditPolicyFile != "" {
		return cfg.AuditPolicyFile
	}
	return cfg.DataDir.Server("etc", "audit-policy.yaml")
}

// writeHardening writes the files that those flags refer to.
func writeHardening(cfg *config.Server) error {
	if cfg.AuditLog {
		// The log itself is created with mode 0600.
		if err := os.MkdirAll(cfg.DataDir.Server("logs"), 0o700); err != nil {
			return err
		}
		if cfg.AuditPolicyFile == "" {
			if err := atomicfile.Write(auditPolicyFile(cfg), auditPolicy, 0o600); err != nil {
				return err
			}
		}
		if _, err := policy.LoadPolicyFromFile(auditPolicyFile(cfg)); err != nil {
			return fmt.Errorf("--audit-policy-file: %w", err)
		}
	}
	if !admissionNeeded(cfg) {
		return nil
	}
	text, err := admissionConfiguration(cfg.PodSecurity)
	if err != nil {
		return fmt.Errorf("--pod-security: %w", err)
	}
	return atomicfile.Write(admissionFile(cfg), text, 0o600)
}

// admissionConfiguration returns the default level of Pod Security, with exemptions for the cluster's own namespaces. The
// limits for events apply if the user enables the plugin EventRateLimit; they are far above a node's usual rate.
func admissionConfiguration(level string) ([]byte, error) {
	pods, err := json.Marshal(podsecurity.PodSecurityConfiguration{
		TypeMeta: metav1.TypeMeta{APIVersion: "pod-security.admission.config.k8s.io/v1", Kind: "PodSecurityConfiguration"},
		Defaults: podsecurity.PodSecurityDefaults{
			Enforce: level, EnforceVersion: "latest", Audit: level, AuditVersion: "latest", Warn: level, WarnVersion: "latest",
		},
		Exemptions: podsecurity.PodSecurityExemptions{Namespaces: []string{metav1.NamespaceSystem, "istio-system"}},
	})
	if err != nil {
		return nil, err
	}
	events, err := json.Marshal(eventratelimit.Configuration{
		TypeMeta: metav1.TypeMeta{APIVersion: "eventratelimit.admission.k8s.io/v1alpha1", Kind: "Configuration"},
		Limits:   []eventratelimit.Limit{{Type: eventratelimit.ServerLimitType, QPS: 5000, Burst: 20000}},
	})
	if err != nil {
		return nil, err
	}
	return yaml.Marshal(apiserver.AdmissionConfiguration{
		TypeMeta: metav1.TypeMeta{APIVersion: "apiserver.config.k8s.io/v1", Kind: "AdmissionConfiguration"},
		Plugins: []apiserver.AdmissionPluginConfiguration{
			{Name: "PodSecurity", Configuration: &runtime.Unknown{Raw: pods}},
			{Name: "EventRateLimit", Configuration: &runtime.Unknown{Raw: events}},
		},
	})
}
