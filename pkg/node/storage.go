package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// makeStorage creates the folder of local-path volumes, which are open to every user, so the folder is not. The kubelet would create it
// with mode 0755. It has the same path on all nodes, the servers'. Outside of this node's data dir an existing folder may be
// someone else's and is not changed; the result is then whether others can enter it.
func (o Options) makeStorage() (open bool, err error) {
	if o.StorageDir == "" {
		return false, nil
	}
	if err := os.MkdirAll(o.StorageDir, 0o700); err != nil {
		return false, fmt.Errorf("create the folder of volumes: %w", err)
	}
	if rest, ours := strings.CutPrefix(o.StorageDir, string(o.Settings.DataDir)+string(filepath.Separator)); ours && rest != "" {
		if err := os.Chmod(o.StorageDir, 0o700); err != nil {
			return false, fmt.Errorf("close the folder of volumes to other users: %w", err)
		}
		return false, nil
	}
	info, err := os.Stat(o.StorageDir)
	if err != nil {
		return false, fmt.Errorf("look for the folder of volumes: %w", err)
	}
	return info.Mode().Perm()&0o011 != 0, nil
}
