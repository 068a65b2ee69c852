package logql

import (
	"slices"
	"strings"

	"polymesh.dev/polymesh/observe/logstore"
)

// levelLabel is the metadata by which Grafana colours lines and their histogram. Loki makes it when a line is stored; here it is made when one
// is read, so it costs nothing without queries.
const levelLabel = "detected_level"

// WithLevel adds the level of an entry that does not say it itself, as lines of a query have it.
func WithLevel(e logstore.Entry) logstore.Entry {
	if logstore.Value(e.Metadata, levelLabel) != "" || logstore.Value(e.Labels, levelLabel) != "" {
		return e
	}
	e.Metadata = append(slices.Clip(e.Metadata), logstore.Field{Name: levelLabel, Value: levelOf(e)})
	return e
}

// levelNames are the fields that hold a level, as people name them.
var levelNames = []string{"level", "LEVEL", "Level", "log.level", "severity", "SEVERITY", "Severity", "SeverityText", "severity_text", "lvl", "LVL", "Lvl"}

// levels are the words for each level.
var levels = map[string]string{
	"trace": "trace", "trc": "trace",
	"debug": "debug", "dbg": "debug",
	"info": "info", "inf": "info", "information": "info", "notice": "info",
	"warn": "warn", "wrn": "warn", "warning": "warn",
	"error": "error", "err": "error",
	"critical": "critical", "crit": "critical",
	"fatal": "fatal", "panic": "fatal", "emerg": "fatal", "alert": "fatal",
}

const noLevel = "unknown"

// levelOf finds the level: in what came with the line, in a field of a line in JSON or logfmt, or as a word at its beginning.
func levelOf(e logstore.Entry) string {
	for _, name := range levelNames {
		for _, fields := range [...][]logstore.Field{e.Metadata, e.Labels} {
			if level, ok := levels[strings.ToLower(logstore.Value(fields, name))]; ok {
				return level
			}
		}
	}
	const looked = 1024 // bytes at the beginning
	line := e.Line[:min(len(e.Line), looked)]
	if level, ok := levelField(line); ok {
		return level
	}
	return levelWord(line)
}

// levelField finds "level":"info" and level=info. It does not parse: the line may be cut, and this is done for each line.
func levelField(line string) (string, bool) {
	for _, name := range levelNames {
		for from := 0; ; {
			at := strings.Index(line[from:], name)
			if at < 0 {
				break
			}
			at += from
			from = at + len(name)
			if at > 0 && line[at-1] != '"' && line[at-1] != ' ' && line[at-1] != ',' && line[at-1] != '{' {
				continue
			}
			value := strings.TrimLeft(line[from:], `" `)
			if value == "" || value[0] != ':' && value[0] != '=' {
				continue
			}
			value = strings.TrimLeft(value[1:], `" `)
			end := strings.IndexFunc(value, func(c rune) bool { return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') })
			if end < 0 {
				end = len(value)
			}
			if level, ok := levels[strings.ToLower(value[:end])]; ok {
				return level, true
			}
		}
	}
	return "", false
}

// levelWord finds a level among the first words of a line: 2026-11-30T04:07:00Z WARN [main] …
func levelWord(line string) string {
	words := 0
	for word := range strings.FieldsFuncSeq(line, func(c rune) bool { return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') }) {
		if level, ok := levels[strings.ToLower(word)]; ok {
			return level
		}
		if words++; words == 6 {
			break
		}
	}
	return noLevel
}
