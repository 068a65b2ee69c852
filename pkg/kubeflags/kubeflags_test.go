package kubeflags

import (
	"slices"
	"testing"

	"github.com/spf13/pflag"
)

func TestMerge(t *testing.T) {
	ours := map[string]string{"secure-port": "6443", "profiling": "false", "bind-address": "0.0.0.0"}
	for _, c := range []struct {
		user, want []string
	}{
		{nil, []string{"--bind-address=0.0.0.0", "--profiling=false", "--secure-port=6443"}},
		{[]string{"profiling=true"}, []string{"--bind-address=0.0.0.0", "--secure-port=6443", "--profiling=true"}},
		{[]string{"--profiling"}, []string{"--bind-address=0.0.0.0", "--secure-port=6443", "--profiling"}},
		{[]string{"v=2", "tls-sni-cert-key=a", "tls-sni-cert-key=b,c=d"},
			[]string{"--bind-address=0.0.0.0", "--profiling=false", "--secure-port=6443", "--v=2", "--tls-sni-cert-key=a", "--tls-sni-cert-key=b,c=d"}},
	} {
		if got := Merge(ours, c.user); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.user, got, c.want)
		}
	}
	if len(ours) != 3 {
		t.Error("the map was changed")
	}
}

func TestSets(t *testing.T) {
	user := []string{"v=2", "--profiling", "encryption-provider-config=/a"}
	for name, want := range map[string]bool{"v": true, "profiling": true, "encryption-provider-config": true, "encryption-provider": false} {
		if Sets(user, name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

func TestCheck(t *testing.T) {
	flags := func() (*pflag.FlagSet, *int) {
		f := pflag.NewFlagSet("kubelet", pflag.ExitOnError)
		return f, f.Int("max-pods", 110, "")
	}
	f, n := flags()
	if err := Check("kubelet-arg", f, []string{"--max-pods=20"}); err != nil || *n != 20 {
		t.Errorf("%v, %d", err, *n)
	}
	for args, want := range map[string]string{
		"--max-pod=20":    "--kubelet-arg: unknown flag: --max-pod",
		"--max-pods=many": `--kubelet-arg: invalid argument "many" for "--max-pods" flag: strconv.ParseInt: parsing "many": invalid syntax`,
	} {
		f, _ := flags()
		if err := Check("kubelet-arg", f, []string{args}); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}
