package reset

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
)

// maxKubeconfig is the maximum size of a kubeconfig that is read, in bytes.
const maxKubeconfig = 4 << 20

// ownKubeconfig reports whether a kubeconfig has access to this data dir's cluster and nothing else, so
// that it can be removed with the cluster; otherwise it returns the reason. ca is the certificate of the cluster's authority, in PEM. Both
// results are empty if the file does not exist.
func ownKubeconfig(path string, ca []byte) (ours bool, why string) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, ""
	}
	if err != nil {
		return false, err.Error()
	}
	if !info.Mode().IsRegular() {
		return false, "it is not a regular file"
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err.Error()
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKubeconfig+1))
	if err != nil {
		return false, err.Error()
	}
	config, err := clientcmd.Load(text)
	if len(text) > maxKubeconfig || err != nil || len(config.Clusters) == 0 {
		return false, "it is not a kubeconfig"
	}
	name := ""
	for n, cluster := range config.Clusters {
		if len(ca) > 0 && bytes.Equal(bytes.TrimSpace(cluster.CertificateAuthorityData), bytes.TrimSpace(ca)) {
			name = n
		}
	}
	switch {
	case len(ca) == 0:
		return false, "this data dir has no authority to identify this cluster's kubeconfig"
	case name == "":
		return false, "it is another cluster's"
	case len(config.Clusters) > 1 || len(config.AuthInfos) > 1 || len(config.Contexts) > 1:
		return false, fmt.Sprintf("it has access to other clusters too. To remove this one: kubectl config --kubeconfig %q delete-cluster %q, and its user and context likewise", path, name)
	}
	return true, ""
}
