package command

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// outputFlag adds -o to a command with machine-readable output.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "", "output format: json or yaml (default: a table)")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// checkOutput rejects an invalid format before anything is done.
func checkOutput(format string) error {
	_, err := printAs(io.Discard, format, nil)
	return err
}

// printAs prints v in the given format; it returns false for the default one, which the command prints itself.
func printAs(w io.Writer, format string, v any) (bool, error) {
	switch format {
	case "":
		return false, nil
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return true, enc.Encode(v)
	case "yaml":
		text, err := yaml.Marshal(v)
		if err == nil {
			_, err = w.Write(text)
		}
		return true, err
	}
	return true, fmt.Errorf("--output %q is not one of json, yaml", format)
}

type versions struct {
	Polymesh   string   `json:"polymesh"`
	Kubernetes string   `json:"kubernetes"`
	Istio      string   `json:"istio"`
	Go         string   `json:"go"`
	Images     []string `json:"images,omitempty"`
}

func (v versions) print(w io.Writer, format string) error {
	if done, err := printAs(w, format, v); done {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "polymesh\t%s\nkubernetes\t%s\nistio\t%s\ngo\t%s\n", v.Polymesh, v.Kubernetes, v.Istio, v.Go)
	for _, image := range v.Images {
		fmt.Fprintf(t, "image\t%s\n", image)
	}
	return t.Flush()
}

func mib(bytes uint64) string {
	if bytes == 0 {
		return "-"
	}
	return fmt.Sprintf("%d MiB", bytes>>20)
}
