package kubeconfig

import (
	"fmt"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Config reads a kubeconfig, and nothing but that file: neither the environment nor a default location.
func Config(file string) (*rest.Config, error) {
	// Without a file, client-go would use the credentials of a pod.
	if file == "" {
		return nil, fmt.Errorf("no kubeconfig is set")
	}
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", file, err)
	}
	return config, nil
}

// Client returns a client with the identity in a kubeconfig. change adjusts its configuration, such as its rate limit; nil leaves
// client-go's defaults.
func Client(file string, change func(*rest.Config)) (*kubernetes.Clientset, error) {
	config, err := Config(file)
	if err != nil {
		return nil, err
	}
	if change != nil {
		change(config)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("create an API client from %s: %w", file, err)
	}
	return client, nil
}
