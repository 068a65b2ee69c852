package service

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The unit of the service. Killing only the server (KillMode=process) leaves the pods alone when it restarts; the cgroups
// below it are its own to manage (Delegate=yes). A start may take any time, and is over when the server reports it
// (Type=notify). The limits are those of K3s's install.sh.
const unitTemplate = `# Written by polymesh install. Changes go into a drop-in: systemctl edit polymesh
[Unit]
Description=Polymesh: Kubernetes and Istio
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
EnvironmentFile=-/etc/default/polymesh
EnvironmentFile=-%s
ExecStart=%s %s%s
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s

[Install]
WantedBy=multi-user.target
`

// unitFile renders the unit of a server, or an agent, with these arguments.
func unitFile(role Role, args []string) ([]byte, error) {
	var words strings.Builder
	for _, arg := range args {
		quoted, err := quoteArgument(arg)
		if err != nil {
			return nil, err
		}
		words.WriteString(" \\\n    " + quoted)
	}
	return fmt.Appendf(nil, unitTemplate, EnvironmentFile, Program, role, words.String()), nil
}

var plainWord = regexp.MustCompile(`^[-A-Za-z0-9_=+,./:@]+$`)

// quoteArgument writes one word of a command line as systemd reads it: systemd.service(5), "Command lines" ($ and %), and
// systemd.syntax(7), "Quoting".
func quoteArgument(word string) (string, error) {
	if err := printable(word); err != nil {
		return "", err
	}
	if plainWord.MatchString(word) {
		return word, nil
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `$$`, `%`, `%%`).Replace(word) + `"`, nil
}

// environmentFile renders variables as systemd.exec(5), EnvironmentFile=, reads them: in double quotes a backslash stands
// before \, ", $ and `.
func environmentFile(variables []string) ([]byte, error) {
	if len(variables) == 0 {
		return nil, nil
	}
	var text strings.Builder
	text.WriteString("# Written by polymesh install. Your own variables go into /etc/default/polymesh.\n")
	for _, variable := range variables {
		key, value, _ := strings.Cut(variable, "=")
		if err := printable(value); err != nil {
			return nil, fmt.Errorf("environment variable %s: %w", key, err)
		}
		text.WriteString(key + `="` + environmentEscapes.Replace(value) + "\"\n")
	}
	return []byte(text.String()), nil
}

var (
	environmentEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`")
	environmentLine    = regexp.MustCompile("^([A-Za-z_][A-Za-z0-9_]*)=\"((?:[^\"\\\\]|\\\\[\"\\\\$`])*)\"$")
	environmentEscaped = regexp.MustCompile(`\\(.)`)
)

// readEnvironment reads a file of environmentFile's. None is an empty one.
func readEnvironment(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the service's environment: %w", err)
	}
	var variables []string
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		match := environmentLine.FindStringSubmatch(line)
		if match == nil {
			return nil, fmt.Errorf("%s, line %d, is not as `polymesh install` writes it: NAME=\"value\"", path, n)
		}
		variables = append(variables, match[1]+"="+environmentEscaped.ReplaceAllString(match[2], "$1"))
	}
	return variables, lines.Err()
}

// printable refuses what could end a line of a unit, or would not be seen in it.
func printable(value string) error {
	if !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
		return fmt.Errorf("%q has control characters in it, which a systemd unit cannot hold: put it into the config file", value)
	}
	return nil
}
