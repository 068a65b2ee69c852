package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write the table of settings into docs/start/config.md")

// The table in the docs is generated from the flags.
func TestDocsListEverySetting(t *testing.T) {
	checkTable(t, "settings", settingsTable(ServerFlags()))
}

// checkTable compares the table between two comments of the page, and writes it with -update.
func checkTable(t *testing.T, marker, table string) {
	t.Helper()
	const path, begin = "../../docs/start/config.md", "-->\n"
	end := "<!-- end of " + marker + " -->"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), "<!-- "+marker+":")
	head, rest, ok2 := strings.Cut(rest, begin)
	_, after, ok3 := strings.Cut(rest, end)
	if !ok || !ok2 || !ok3 {
		t.Fatalf("%s has no markers for the table", path)
	}
	want := before + "<!-- " + marker + ":" + head + begin + table + end + after
	if want == string(text) {
		return
	}
	if !*update {
		t.Fatalf("%s is not up to date: go test ./pkg/config -args -update", path)
	}
	if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

func settingsTable(flags *Flags) string {
	var b strings.Builder
	b.WriteString("| flag | environment | default | what it is |\n| --- | --- | --- | --- |\n")
	flags.VisitAll(func(f *pflag.Flag) {
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" && f.Shorthand != f.Name {
			name += ", `-" + f.Shorthand + "`"
		}
		def := strings.Trim(f.DefValue, "[]")
		if def != "" {
			def = "`" + def + "`"
		}
		usage := strings.ReplaceAll(f.Usage, "|", `\|`)
		fmt.Fprintf(&b, "| %s | `%s%s` | %s | %s |\n", name, envPrefix, strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_")), def, usage)
	})
	return b.String()
}
