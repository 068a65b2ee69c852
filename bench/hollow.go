package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"polymesh.dev/polymesh/test/e2e/node"
)

// pretends is the label and the taint of nodes that run no containers; its value is the program.
const pretends = "polymesh.dev/bench"

// kubelets are Kubernetes' own, by kubemark: all of a kubelet but containers, volumes and cgroups. Each has a process and a certificate.
type kubelets struct {
	machine   *node.Node // in whose network they are
	processes []*exec.Cmd
}

// startKubelets starts a number of kubelets on a machine of their own.
func (b *bench) startKubelets(ctx context.Context, machine, server *node.Node, client kubernetes.Interface, count int) (k *kubelets, err error) {
	k = &kubelets{machine: machine}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.stop())
		}
	}()
	for i := range count {
		name := fmt.Sprintf("hollow-%d", i+1)
		dir := filepath.Join(machine.Dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return k, err
		}
		kubeconfig := filepath.Join(dir, "kubeconfig")
		if err := nodeKubeconfig(ctx, server, client, name, kubeconfig); err != nil {
			return k, fmt.Errorf("the certificate of %s: %w", name, err)
		}
		// The node is there before its kubelet, which otherwise registers it at its second attempt, after ten seconds, and then is often not
		// ready for minutes: it could not write its CSINode.
		if _, err := client.CoreV1().Nodes().Create(ctx, pretendedNode(name, "kubemark"), metav1.CreateOptions{}); err != nil {
			return k, err
		}
		log, err := os.Create(filepath.Join(dir, "log"))
		if err != nil {
			return k, err
		}
		defer log.Close()
		cmd := machine.Command(ctx, filepath.Join(b.top, ".build", "bench", "kubemark"), "--morph=kubelet", "--name="+name, "--kubeconfig="+kubeconfig,
			"--use-host-image-service=false", fmt.Sprintf("--kubelet-port=%d", 20000+i), fmt.Sprintf("--kubelet-read-only-port=%d", 30000+i),
			"--kube-api-qps=50", "--kube-api-burst=100") // a kubelet's own
		cmd.Env = append(cmd.Env, "TMPDIR="+dir)
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			return k, err
		}
		k.processes = append(k.processes, cmd)
	}
	return k, nil
}

// anonymous is the anonymous memory of all kubelets, in MB.
func (k *kubelets) anonymous() (sum float64) {
	for _, p := range k.processes {
		sum += anonymousMemory(p.Process.Pid)
	}
	return sum
}

func (k *kubelets) stop() error {
	var failures []error
	for _, p := range k.processes {
		failures = append(failures, kill(p))
	}
	return errors.Join(failures...)
}

// kill kills a process that runs until then, and reports if it has ended before.
func kill(p *exec.Cmd) error {
	if err := p.Process.Kill(); err != nil {
		return fmt.Errorf("%s has ended: %w", filepath.Base(p.Path), err)
	}
	_ = p.Wait() // killed
	return nil
}

// nodeKubeconfig writes the kubeconfig of a node, with a certificate that the cluster signs.
func nodeKubeconfig(ctx context.Context, server *node.Node, client kubernetes.Interface, name, file string) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}},
	}, private)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	requests := client.CertificatesV1().CertificateSigningRequests()
	_, err = requests.Create(ctx, &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: request}),
			SignerName: certificatesv1.KubeAPIServerClientKubeletSignerName,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	// The controllers approve it, because an administrator may ask for any node's, and sign it.
	var made *certificatesv1.CertificateSigningRequest
	err = eventually(ctx, server, startLimit, func() (err error) {
		if made, err = requests.Get(ctx, name, metav1.GetOptions{}); err == nil && len(made.Status.Certificate) == 0 {
			err = errors.New("the request is not signed")
		}
		return err
	})
	if err != nil {
		return err
	}
	config, err := server.ClientConfig()
	if err != nil {
		return err
	}
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters["bench"] = &clientcmdapi.Cluster{Server: "https://" + server.Address() + ":6443", CertificateAuthorityData: config.CAData, CertificateAuthority: config.CAFile}
	kubeconfig.AuthInfos["bench"] = &clientcmdapi.AuthInfo{
		ClientCertificateData: made.Status.Certificate, ClientKeyData: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	}
	kubeconfig.Contexts["bench"] = &clientcmdapi.Context{Cluster: "bench", AuthInfo: "bench"}
	kubeconfig.CurrentContext = "bench"
	return clientcmd.WriteToFile(*kubeconfig, file) // 0600
}

// selfSigned returns certificate and key of a server with this address, as PEM. The certificate is its own authority.
func selfSigned(address string) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: address}, SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.ParseIP(address)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	text, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text}), nil
}
