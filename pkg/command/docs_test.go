package command

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Every command of Polymesh in the documentation exists, with its flags. So does a flag that is named alone in the pages about the
// server's settings and operation.
func TestDocumentedCommands(t *testing.T) {
	root := newRoot()
	pages, found := []string{"../../README.md", "../../CONTRIBUTING.md"}, 0
	err := filepath.WalkDir("../../docs", func(path string, d fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".md" {
			pages = append(pages, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	var collect func(*cobra.Command)
	collect = func(cmd *cobra.Command) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) { known[f.Name] = true })
		for _, sub := range cmd.Commands() {
			collect(sub)
		}
	}
	collect(root)
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		ours := strings.Contains(page, "/operate/") || strings.Contains(page, "/start/")
		for _, code := range codeOf(string(text)) {
			for _, line := range commandLines(code) {
				found++
				if problem := unknownIn(root, line); problem != "" {
					t.Errorf("%s: `polymesh %s`: %s", page, strings.Join(line, " "), problem)
				}
			}
			if name, ok := strings.CutPrefix(code, "--"); ok && ours {
				name = nameOf(name)
				if name != "" && !known[name] && !slices.Contains(othersFlags, name) {
					t.Errorf("%s: `%s` is a flag of no command", page, code)
				}
			}
		}
	}
	if found < 100 {
		t.Errorf("the pages have only %d commands", found)
	}
	for _, line := range []string{"sudo polymesh snapshot safe", "polymesh status --wait", "./polymesh install --now --cluster-start | cat"} {
		if lines := commandLines(line); len(lines) != 1 || unknownIn(root, lines[0]) == "" {
			t.Errorf("%q counts as a command: %q", line, lines)
		}
	}
}

// othersFlags are flags that the pages name alone: of docker, etcdutl and cosign, and K3s's names of ours.
var othersFlags = []string{"docker-password", "bump-revision", "insecure-ignore-tlog", "etcd-s3-bucket"}

var (
	codeBlock = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```")
	codeSpan  = regexp.MustCompile("`([^`\n]+)`")
	// program is the program at the beginning of a command, in all the ways in which pages call it.
	program  = regexp.MustCompile(`(?:^|[\s(]|[./]/)polymesh((?: [^\s|&;<>#()…]\S*)+)`)
	flagName = regexp.MustCompile(`^[a-z][a-z0-9-]*`)
	word     = regexp.MustCompile(`^[a-z][a-z-]*$`)
)

func nameOf(text string) string { return flagName.FindString(text) }

// codeOf returns the code of a page: each line of its blocks, and its spans.
func codeOf(page string) []string {
	var code []string
	for _, block := range codeBlock.FindAllStringSubmatch(page, -1) {
		code = append(code, strings.Split(block[1], "\n")...)
	}
	for _, span := range codeSpan.FindAllStringSubmatch(codeBlock.ReplaceAllString(page, ""), -1) {
		code = append(code, span[1])
	}
	return code
}

// commandLines returns the arguments of each `polymesh` in a piece of code.
func commandLines(code string) [][]string {
	var lines [][]string
	for _, m := range program.FindAllStringSubmatch(code, -1) {
		lines = append(lines, strings.Fields(m[1]))
	}
	return lines
}

// unknownIn returns what a command line has that the program does not; empty if there is nothing.
func unknownIn(root *cobra.Command, line []string) string {
	cmd := root
	for i, arg := range line {
		name, isFlag := strings.CutPrefix(arg, "--")
		switch {
		case cmd.DisableFlagParsing || arg == "--":
			return "" // of another program
		case isFlag:
			if name = nameOf(name); name != "help" && cmd.Flag(name) == nil {
				return "there is no flag --" + name
			}
		case cmd.HasSubCommands() && i < len(line) && word.MatchString(arg):
			next := slices.IndexFunc(cmd.Commands(), func(c *cobra.Command) bool { return c.Name() == arg || c.HasAlias(arg) })
			if next < 0 {
				return "there is no command " + arg
			}
			cmd = cmd.Commands()[next]
		}
	}
	return ""
}
