package install

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// The record is not in istio-system, so that `istioctl uninstall --purge` and a deleted namespace do not remove it.
const (
	recordNamespace = metav1.NamespaceSystem
	recordName      = "polymesh-mesh"
)

// readRecord returns nil if there is no record.
func readRecord(ctx context.Context, client kubernetes.Interface) (*Record, error) {
	cm, err := client.CoreV1().ConfigMaps(recordNamespace).Get(ctx, recordName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of the installation: %w", err)
	}
	return parseRecord(cm.Data)
}

func parseRecord(data map[string]string) (*Record, error) {
	r := &Record{
		Owner:        Owner(data["owner"]),
		Phase:        Phase(data["phase"]),
		Identity:     Identity{Version: data["version"], Profile: data["profile"], Values: data["values"]},
		IngressClass: data["ingressClass"] == "true",
		GatewayAPI:   data["gatewayAPI"],
		Objects:      map[string]string{},
	}
	if shared := strings.Fields(data["shared"]); len(shared) > 0 {
		r.Shared = shared
	}
	if o := data["objects"]; o != "" {
		if err := json.Unmarshal([]byte(o), &r.Objects); err != nil {
			return nil, damaged(err)
		}
	}
	if t := data["telemetry"]; t != "" {
		if err := json.Unmarshal([]byte(t), &r.Telemetry); err != nil {
			return nil, damaged(err)
		}
	}
	return r, nil
}

func damaged(err error) error {
	return fmt.Errorf("the record of the installation, ConfigMap %s/%s, is damaged; delete it and Istio, and the next start installs again: %w", recordNamespace, recordName, err)
}

func (r *Record) data() (map[string]string, error) {
	objects, err := json.MarshalIndent(r.Objects, "", " ")
	if err != nil {
		return nil, fmt.Errorf("write the record of the installation: %w", err)
	}
	data := map[string]string{
		"owner":        string(r.Owner),
		"phase":        string(r.Phase),
		"version":      r.Version,
		"profile":      r.Profile,
		"values":       r.Values,
		"ingressClass": fmt.Sprint(r.IngressClass),
		"gatewayAPI":   r.GatewayAPI,
		"objects":      string(objects),
		// Keys have no spaces: the API server does not allow them in a group, kind, namespace or name.
		"shared": strings.Join(r.Shared, "\n"),
	}
	if r.Telemetry != (TelemetryRecord{}) {
		telemetry, err := json.Marshal(r.Telemetry)
		if err != nil {
			return nil, fmt.Errorf("write the record of the installation: %w", err)
		}
		data["telemetry"] = string(telemetry)
	}
	return data, nil
}

// writeRecord creates or replaces the record.
func writeRecord(ctx context.Context, client kubernetes.Interface, r *Record) error {
	data, err := r.data()
	if err != nil {
		return err
	}
	cm := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{
			Name:        recordName,
			Namespace:   recordNamespace,
			Annotations: map[string]string{"kubernetes.io/description": "What the Polymesh server installed of Istio. Without it, the server installs where no Istio is."},
		},
		Data: data,
	}
	configMaps := client.CoreV1().ConfigMaps(recordNamespace)
	_, err = configMaps.Update(ctx, cm, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = configMaps.Create(ctx, cm, metav1.CreateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write the record of the installation: %w", err)
	}
	return nil
}
