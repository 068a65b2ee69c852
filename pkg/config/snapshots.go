package config

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	"github.com/spf13/pflag"
)

// passphraseVariable is the environment variable with the passphrase of snapshots. There is no flag for it, because other users
// of a machine can read those.
const passphraseVariable = envPrefix + "SNAPSHOT_PASSPHRASE"

// rawSnapshots are the settings of snapshots as written.
type rawSnapshots struct {
	disabled       bool
	schedule       string
	retention      int
	dir            string
	passphraseFile string
	passphrase     string

	s3                           bool
	endpoint, endpointCA         string
	skipVerify, insecure         bool
	accessKey, accessKeyFile     string
	secretKey, secretKeyFile     string
	bucket, region, bucketFolder string
	timeout                      time.Duration
}

// snapshotFlags adds K3s's settings of snapshots. Its names speak of etcd, which is only one of the datastores, so ServerNames translates
// them.
func (f *Flags) snapshotFlags() {
	r := &f.raw.snapshots
	f.BoolVar(&r.disabled, "disable-snapshots", false, "save no snapshots on a schedule, nor before the first start of another version and before Secrets are rewritten")
	f.StringVar(&r.schedule, "snapshot-schedule", "0 */12 * * *", "when snapshots are saved: a cron expression, in local time")
	f.IntVar(&r.retention, "snapshot-retention", 5, "how many scheduled snapshots are kept, in the folder and in S3")
	f.StringVar(&r.dir, "snapshot-dir", "", "folder for snapshots (default: server/snapshots in the data dir)")
	f.StringVar(&r.passphraseFile, "snapshot-passphrase-file", "", "file with a passphrase that encrypts snapshots, which contain the keys of the cluster; or the variable "+passphraseVariable)
	f.BoolVar(&r.s3, "s3", false, "also keep snapshots in S3")
	f.StringVar(&r.endpoint, "s3-endpoint", "s3.amazonaws.com", "host name of S3, or host:port")
	f.StringVar(&r.endpointCA, "s3-endpoint-ca", "", "file with the certificate authority of that host (default: the system's)")
	f.BoolVar(&r.skipVerify, "s3-skip-ssl-verify", false, "accept every certificate of that host")
	f.BoolVar(&r.insecure, "s3-insecure", false, "use HTTP instead of HTTPS")
	f.StringVar(&r.accessKey, "s3-access-key", "", "access key; other users of this machine can read it in the list of processes (default: the variable AWS_ACCESS_KEY_ID, or the machine's role)")
	f.StringVar(&r.accessKeyFile, "s3-access-key-file", "", "file with the access key")
	f.StringVar(&r.secretKey, "s3-secret-key", "", "secret key; other users of this machine can read it in the list of processes")
	f.StringVar(&r.secretKeyFile, "s3-secret-key-file", "", "file with the secret key")
	f.StringVar(&r.bucket, "s3-bucket", "", "name of the bucket, which exists")
	f.StringVar(&r.region, "s3-region", "us-east-1", "region of the bucket")
	f.StringVar(&r.bucketFolder, "s3-folder", "", "folder in the bucket")
	f.DurationVar(&r.timeout, "s3-timeout", 5*time.Minute, "time for one transfer")
}

// ServerNames translates K3s's names of flags (https://docs.k3s.io/cli/etcd-snapshot).
func ServerNames(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	switch {
	case name == "etcd-disable-snapshots":
		return "disable-snapshots"
	case name == "etcd-snapshot-schedule-cron":
		return "snapshot-schedule"
	case name == "etcd-snapshot-retention", name == "etcd-snapshot-dir":
		return pflag.NormalizedName(strings.TrimPrefix(name, "etcd-"))
	case name == "etcd-s3", strings.HasPrefix(name, "etcd-s3-"):
		return pflag.NormalizedName(strings.TrimPrefix(name, "etcd-"))
	}
	return pflag.NormalizedName(name)
}

// SnapshotFlags returns the flags of `polymesh snapshot`: those of a server that concern its snapshots. The environment and the config
// file are the server's, so that the commands find what the server saves. Server completes them.
func SnapshotFlags() *Flags {
	f := ServerFlags()
	some := pflag.NewFlagSet("snapshot", pflag.ContinueOnError)
	some.SortFlags, some.Usage = false, f.Usage
	some.SetNormalizeFunc(SnapshotNames)
	for _, name := range []string{"config", "data-dir", "node-name", "snapshot-dir", "snapshot-passphrase-file"} {
		some.AddFlag(f.Lookup(name))
	}
	f.VisitAll(func(flag *pflag.Flag) {
		if flag.Name == "s3" || strings.HasPrefix(flag.Name, "s3-") {
			some.AddFlag(flag)
		}
	})
	return &Flags{FlagSet: some, of: f}
}

// SnapshotNames translates K3s's names of the flags of its etcd-snapshot command, and shorter ones.
func SnapshotNames(f *pflag.FlagSet, name string) pflag.NormalizedName {
	switch name {
	case "dir", "passphrase-file":
		name = "snapshot-" + name
	case "snapshot-retention", "etcd-snapshot-retention":
		name = "keep"
	}
	return ServerNames(f, name)
}

// clusterFlags are the flags on which all servers of a cluster have to agree, and with which it has to be restored.
func clusterFlags() []string {
	return []string{
		"cluster-cidr", "service-cidr", "cluster-dns", "cluster-domain", "service-node-port-range", "disable", "loadbalancer-pool",
		"mesh-profile", "observe-cluster-access", "secrets-encryption", "secrets-encryption-provider", "pod-security", "flannel-backend", "flannel-port", "flannel-external-ip",
		"disable-network-policy", "embedded-registry", imagePolicyKey,
	}
}

// bucketName is Amazon's rule for names, except that others also allow uppercase and _
// (https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html).
var bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$`)

func (r *rawSnapshots) check(s *Snapshots) (err error) {
	*s = Snapshots{Disabled: r.disabled, Schedule: r.schedule, Retention: r.retention}
	if _, err := cron.ParseStandard(r.schedule); err != nil {
		return fmt.Errorf("--snapshot-schedule %q is not a cron expression such as \"0 */12 * * *\": %s", r.schedule, oneLine(err))
	}
	if r.retention < 1 {
		return fmt.Errorf("--snapshot-retention %d: at least one snapshot is kept; --disable-snapshots saves none", r.retention)
	}
	if r.dir != "" {
		if s.Dir, err = filepath.Abs(r.dir); err != nil {
			return fmt.Errorf("--snapshot-dir %q: %w", r.dir, err)
		}
		if s.Dir == "/" {
			return fmt.Errorf("--snapshot-dir / is refused: use a separate folder")
		}
	}
	// The file comes first: it is set by a flag, and a flag overrides the environment.
	s.Passphrase = strings.TrimSpace(r.passphrase)
	if r.passphraseFile != "" {
		if s.Passphrase, err = secretFile("snapshot-passphrase-file", r.passphraseFile); err != nil {
			return err
		}
	}
	if !r.s3 {
		return nil
	}
	s.S3, err = r.checkS3()
	return err
}

func (r *rawSnapshots) checkS3() (_ *S3, err error) {
	b := &S3{
		Endpoint: r.endpoint, Bucket: r.bucket, Region: r.region, Folder: strings.Trim(r.bucketFolder, "/"),
		AccessKey: r.accessKey, SecretKey: r.secretKey, SkipVerify: r.skipVerify, Insecure: r.insecure, Timeout: r.timeout,
	}
	switch {
	case b.Bucket == "":
		return nil, fmt.Errorf("--s3-bucket is missing: give the name of a bucket that exists")
	case !bucketName.MatchString(b.Bucket):
		return nil, fmt.Errorf("--s3-bucket %q is not the name of a bucket", b.Bucket)
	case b.Endpoint == "" || strings.ContainsAny(b.Endpoint, "/@?# "):
		return nil, fmt.Errorf("--s3-endpoint %q is not a host name or host:port, without https://", b.Endpoint)
	case b.Folder != "" && path.Clean("/"+b.Folder) != "/"+b.Folder:
		return nil, fmt.Errorf("--s3-folder %q is not a path such as clusters/a", b.Folder)
	case b.Timeout <= 0:
		return nil, fmt.Errorf("--s3-timeout %s is not a time such as 5m", b.Timeout)
	case r.accessKey != "" && r.accessKeyFile != "":
		return nil, fmt.Errorf("--s3-access-key and --s3-access-key-file are mutually exclusive: remove one of them")
	case r.secretKey != "" && r.secretKeyFile != "":
		return nil, fmt.Errorf("--s3-secret-key and --s3-secret-key-file are mutually exclusive: remove one of them")
	}
	if r.accessKeyFile != "" {
		if b.AccessKey, err = secretFile("s3-access-key-file", r.accessKeyFile); err != nil {
			return nil, err
		}
	}
	if r.secretKeyFile != "" {
		if b.SecretKey, err = secretFile("s3-secret-key-file", r.secretKeyFile); err != nil {
			return nil, err
		}
	}
	if (b.AccessKey == "") != (b.SecretKey == "") {
		return nil, fmt.Errorf("--s3-access-key and --s3-secret-key belong together: one of them is missing")
	}
	if r.endpointCA != "" {
		if b.CAFile, err = filepath.Abs(r.endpointCA); err != nil {
			return nil, fmt.Errorf("--s3-endpoint-ca: %w", err)
		}
	}
	return b, nil
}

// secretFile returns the secret in a file, without the space around it.
func secretFile(flag, file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("--%s: %w", flag, err)
	}
	secret := strings.TrimSpace(string(text))
	if secret == "" {
		return "", fmt.Errorf("--%s: the file %s is empty", flag, file)
	}
	return secret, nil
}
