package certificate

import (
	"fmt"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// clusterName is the name of the cluster, user and context in every kubeconfig, as in K3s.
const clusterName = "default"

// WriteKubeconfig writes a kubeconfig for the client certificate with this name. It refers to the certificate's files, so
// that a renewed one is used without a restart (client-go reloads them).
func (s Store) WriteKubeconfig(path, name, server string) error {
	return WriteKubeconfig(path, server, s.Cert(ServerCA), s.Cert(name), s.Key(name))
}

// WriteKubeconfig writes a kubeconfig that refers to files, readable only by its owner.
func WriteKubeconfig(path, server, ca, cert, key string) error {
	return write(path, 0o600, server, &api.Cluster{CertificateAuthority: ca}, &api.AuthInfo{ClientCertificate: cert, ClientKey: key})
}

// WritePortableKubeconfig writes a kubeconfig that contains the certificates, so that it can be copied.
func (s Store) WritePortableKubeconfig(path, name, server string, mode os.FileMode) error {
	ca, err := os.ReadFile(s.Cert(ServerCA))
	if err != nil {
		return err
	}
	cert, err := os.ReadFile(s.Cert(name))
	if err != nil {
		return err
	}
	key, err := os.ReadFile(s.Key(name))
	if err != nil {
		return err
	}
	return write(path, mode, server, &api.Cluster{CertificateAuthorityData: ca},
		&api.AuthInfo{ClientCertificateData: cert, ClientKeyData: key})
}

func write(path string, mode os.FileMode, server string, cluster *api.Cluster, user *api.AuthInfo) error {
	cluster.Server = server
	config := api.NewConfig()
	config.Clusters[clusterName] = cluster
	config.AuthInfos[clusterName] = user
	config.Contexts[clusterName] = &api.Context{Cluster: clusterName, AuthInfo: clusterName}
	config.CurrentContext = clusterName
	text, err := clientcmd.Write(*config)
	if err != nil {
		return fmt.Errorf("encode kubeconfig: %w", err)
	}
	if err := atomicfile.Write(path, text, mode); err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", path, err)
	}
	return nil
}
