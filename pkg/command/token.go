package command

import (
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/token"
)

func newToken() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Create, list and revoke the tokens with which machines join the cluster",
	}
	cmd.AddCommand(newTokenCreate(), newTokenList(), newTokenRevoke())
	return cmd
}

func newTokenCreate() *cobra.Command {
	var o join.TokenOptions
	var role string
	var dataDir layout.DataDir
	flags := apiFlags()
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a token and print it",
		Long: `Create a token and print it. On the machine that joins:

  sudo ./polymesh install --now --server https://HOST:6443 --token-file FILE
  sudo polymesh agent --server https://HOST:6443 --token-file FILE

With --role server, on a server, it is one with which machines become servers: its holder can become the cluster's administrator.

  sudo ./polymesh install server --now --server https://HOST:6443 --token-file FILE
  sudo polymesh server --server https://HOST:6443 --token-file FILE`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.TTL < 0 {
				return fmt.Errorf("--ttl %s: a token cannot expire before it exists: give a positive time, or 0 for no end", o.TTL)
			}
			if o.Role = token.Role(role); !slices.Contains(token.Roles(), o.Role) {
				return fmt.Errorf("--role %q is neither agent nor server", role)
			}
			client, config, err := apiClient(cmd.Context(), flags)
			if err != nil {
				return err
			}
			hash, err := authorityHash(config)
			if err != nil {
				return err
			}
			t, err := join.CreateToken(cmd.Context(), client, hash, o, join.ShareToken(dataDir.BootstrapKey(), dataDir.DatastoreEndpoint()))
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), t)
			return nil
		},
	}
	cmd.Flags().StringVar(&role, "role", string(token.Agent), "what machines become with it: agent or server")
	complete(cmd, "role", []string{string(token.Agent), string(token.Server)})
	dataDirFlag(cmd, &dataDir)
	cmd.Flags().DurationVar(&o.TTL, "ttl", 24*time.Hour, "how long it can be used, such as 72h; 0: it does not expire")
	cmd.Flags().StringVar(&o.Description, "description", "", "what it is for")
	flags.AddFlags(cmd.Flags())
	return cmd
}

func newTokenList() *cobra.Command {
	var output string
	flags := apiFlags()
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the tokens, without their secrets",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			client, _, err := apiClient(cmd.Context(), flags)
			if err != nil {
				return err
			}
			tokens, err := join.ListTokens(cmd.Context(), client)
			if err != nil {
				return err
			}
			if done, err := printAs(cmd.OutOrStdout(), output, tokens); done {
				return err
			}
			return printTokens(cmd.OutOrStdout(), tokens, time.Now())
		},
	}
	outputFlag(cmd, &output)
	flags.AddFlags(cmd.Flags())
	return cmd
}

func newTokenRevoke() *cobra.Command {
	flags := apiFlags()
	cmd := &cobra.Command{
		Use:               "revoke ID...",
		Aliases:           []string{"delete"},
		Short:             "Revoke tokens: no machine can join with them. Nodes that have joined stay",
		Args:              someArgs("the id of a token, as `polymesh token list` shows it"),
		ValidArgsFunction: completeTokens(flags),
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, _, err := apiClient(cmd.Context(), flags)
			if err != nil {
				return err
			}
			revoked, err := join.RevokeTokens(cmd.Context(), client, ids...)
			for _, t := range revoked {
				fmt.Fprintf(cmd.OutOrStdout(), "token %s revoked\n", t.ID)
			}
			return err
		},
	}
	flags.AddFlags(cmd.Flags())
	return cmd
}

// completeTokens completes the ids of tokens, with what they are for.
func completeTokens(flags *genericclioptions.ConfigFlags) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
		client, _, err := apiClient(cmd.Context(), flags)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		tokens, err := join.ListTokens(cmd.Context(), client)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var ids []string
		for _, t := range tokens {
			if !slices.Contains(given, t.ID) {
				ids = append(ids, cobra.CompletionWithDesc(t.ID, progress.Line(t.Description)))
			}
		}
		return ids, cobra.ShellCompDirectiveNoFileComp
	}
}

// apiFlags are kubectl's for the API server, of those that make sense for the whole cluster.
func apiFlags() *genericclioptions.ConfigFlags {
	all := genericclioptions.NewConfigFlags(true)
	return &genericclioptions.ConfigFlags{KubeConfig: all.KubeConfig, Context: all.Context}
}

// apiClient reaches the API server that the flags mean, this machine's if they say nothing.
func apiClient(ctx context.Context, flags *genericclioptions.ConfigFlags) (kubernetes.Interface, *rest.Config, error) {
	if err := useClusterKubeconfig(); err != nil {
		return nil, nil, err
	}
	config, err := flags.ToRESTConfig()
	if err != nil {
		return nil, nil, kubeconfig.None(err)
	}
	if err := kubeconfig.Named(flags.ToRawKubeConfigLoader(), config); err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, err
	}
	if _, err := client.Discovery().ServerVersion(); err != nil {
		return nil, nil, kubeconfig.Unreachable(config.Host, err)
	}
	// The version is answered without the datastore; everything else would wait for it for a minute.
	if err := client.Discovery().RESTClient().Get().AbsPath("/readyz/etcd").Do(ctx).Error(); apierrors.IsInternalError(err) {
		return nil, nil, fmt.Errorf("the API server at %s does not reach its datastore, so nothing can be read or changed: `polymesh status` on a server shows why, and what to do", config.Host)
	}
	return client, config, nil
}

// authorityHash returns the hash of the authority in a kubeconfig, for tokens.
func authorityHash(config *rest.Config) (string, error) {
	if err := rest.LoadTLSFiles(config); err != nil {
		return "", err
	}
	ca, err := certificate.ParseAuthority(config.CAData)
	if err != nil {
		return "", fmt.Errorf("the kubeconfig does not contain the cluster's authority, whose hash is part of a token: %w: use the one that the server writes", err)
	}
	return token.Hash(ca), nil
}

func printTokens(w io.Writer, tokens []join.TokenInfo, now time.Time) error {
	if len(tokens) == 0 {
		fmt.Fprintln(w, "there are no tokens: `polymesh token create` creates one")
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "ID\tROLE\tAGE\tEXPIRES\tDESCRIPTION")
	for _, token := range tokens {
		expires := "never"
		if token.Expires != nil {
			expires = "in " + duration.HumanDuration(token.Expires.Sub(now))
		}
		if token.Expired(now) {
			expires = "expired"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", token.ID, token.Role, duration.HumanDuration(now.Sub(token.Created)), expires, progress.Line(token.Description))
	}
	return t.Flush()
}
