package deploy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

// explainApply returns the API server's error with the place of each problem in the manifest.
func (d *deployment) explainApply(o project.Object, err error) error {
	var lines []string
	for _, p := range problems(o, err) {
		line := fmt.Sprintf("apply %s: %s", o.ID(), p.text)
		if p.at != "" {
			line = p.at + ": " + line
		}
		lines = append(lines, line)
	}
	if immutable(err) {
		lines = append(lines, fmt.Sprintf("This field cannot be changed in place: delete the object first (kubectl delete %s), or give the new one another name", o.ID()))
	}
	return &refusal{strings.Join(lines, "\n"), err}
}

// refusal is the API server's error as text for users.
type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string { return r.text }

func (r *refusal) Unwrap() error { return r.err }

// problem is one problem with an object.
type problem struct{ at, text string }

// typedError is how server-side apply reports that an object does not fit its schema
// (k8s.io/apimachinery/pkg/util/managedfields/internal/structuredmerge.go); one field, or "errors:" and a line for each.
const typedError = "failed to create typed patch object ("

func problems(o project.Object, err error) []problem {
	if _, details, ok := strings.Cut(err.Error(), typedError); ok {
		if _, list, ok := strings.Cut(details, "): "); ok {
			var found []problem
			for _, line := range strings.Split(strings.TrimPrefix(strings.TrimSpace(list), "errors:"), "\n") {
				if line = strings.TrimSpace(line); line != "" {
					field, text := cutField(line)
					found = append(found, problem{o.At(pathIn(o.Object, field)...), strings.TrimPrefix(field, ".") + ": " + readable(text)})
				}
			}
			if len(found) > 0 {
				return found
			}
		}
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) && apierrors.IsInvalid(err) {
		var found []problem
		if details := status.Status().Details; details != nil {
			for _, cause := range details.Causes {
				p := problem{o.At(pathIn(o.Object, "."+cause.Field)...), readable(cause.Message)}
				if cause.Field != "" {
					p.text = cause.Field + ": " + p.text
				}
				if !slices.Contains(found, p) {
					found = append(found, p)
				}
			}
		}
		if len(found) > 0 {
			return found
		}
	}
	return []problem{{o.At(), readable(err.Error())}}
}

// cutField splits ".spec.a[name=\"x: y\"].b: expected string, got 1" after the field.
func cutField(line string) (field, text string) {
	quoted := false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '\\' && quoted:
			i++
		case line[i] == '"':
			quoted = !quoted
		case !quoted && strings.HasPrefix(line[i:], ": "):
			return line[:i], line[i+2:]
		}
	}
	return "", line
}

// goValue is a value as server-side apply prints it.
var goValue = regexp.MustCompile(`&value\.value[A-Za-z]+\{Value:(.*)\}`)

// longestProblem limits how many bytes of a message are shown: the API server prints whole objects.
const longestProblem = 300

// readable returns a message of the API server without Go's names, and without the dump of a value in its middle.
func readable(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if m := goValue.FindStringSubmatch(text); m != nil {
		text = strings.Replace(text, m[0], m[1], 1)
		switch {
		case strings.HasPrefix(text, "expected string"):
			text += fmt.Sprintf(" (write it in quotes: %q)", m[1])
		case strings.HasPrefix(text, "expected numeric"), strings.HasPrefix(text, "expected boolean"):
			text += " (write it without quotes)"
		}
	}
	if len(text) <= longestProblem {
		return text
	}
	if i, j := strings.Index(text, ": "), strings.LastIndex(text, ": "); i >= 0 && i < j && len(text)-j <= longestProblem/2 && i <= longestProblem/2 {
		return text[:i] + text[j:]
	}
	return strings.ToValidUTF8(text[:longestProblem], "") + " …"
}

// pathIn splits a field as the API server names it, "spec.containers[0].image", or as server-side apply does,
// ".spec.containers[name=\"api\"].image", into the parts of its path in the object. It ends where the object does.
func pathIn(at any, field string) []string {
	var path []string
	for field != "" {
		var part string
		switch field[0] {
		case '.':
			part, field = cutName(at, field[1:])
		case '[':
			var inside string
			if inside, field = cutBracket(field); inside == "" {
				return path
			}
			part = itemOf(at, inside)
		default:
			part, field = cutName(at, field)
		}
		if part == "" {
			return path
		}
		path = append(path, part)
		switch container := at.(type) {
		case map[string]any:
			at = container[part]
		case []any:
			i, err := strconv.Atoi(part)
			if err != nil || i < 0 || i >= len(container) {
				return path
			}
			at = container[i]
		default:
			at = nil
		}
	}
	return path
}

// cutName splits off a field's name: the longest key of the map, because names can contain dots that are not escaped, or the text
// before the next dot.
func cutName(at any, field string) (name, rest string) {
	if fields, ok := at.(map[string]any); ok {
		for key := range fields {
			after, ok := strings.CutPrefix(field, key)
			if ok && len(key) > len(name) && (after == "" || after[0] == '.' || after[0] == '[') {
				name, rest = key, after
			}
		}
		if name != "" {
			return name, rest
		}
	}
	if i := strings.IndexAny(field, ".["); i >= 0 {
		return field[:i], field[i:]
	}
	return field, ""
}

func cutBracket(field string) (inside, rest string) {
	quoted := false
	for i := 1; i < len(field); i++ {
		switch {
		case field[i] == '\\' && quoted:
			i++
		case field[i] == '"':
			quoted = !quoted
		case !quoted && field[i] == ']':
			return field[1:i], field[i+1:]
		}
	}
	return "", ""
}

// keyPart is one name="value" of an item's key.
var keyPart = regexp.MustCompile(`([^,="]+)=("(?:[^"\\]|\\.)*"|[^,]*)`)

// itemOf returns the index of the item in brackets, which is an index, `name="api"`, or `="value"`. For a map it is the key.
func itemOf(at any, inside string) string {
	list, ok := at.([]any)
	if !ok {
		return inside
	}
	if _, err := strconv.Atoi(inside); err == nil {
		return inside
	}
	parts := keyPart.FindAllStringSubmatch(inside, -1)
	value, isValue := strings.CutPrefix(inside, "=")
	for i, item := range list {
		if isValue {
			if asText(item) == unquote(value) {
				return strconv.Itoa(i)
			}
			continue
		}
		fields, ok := item.(map[string]any)
		if !ok || len(parts) == 0 {
			continue
		}
		// A key that the manifest omits, such as protocol, has its default.
		if !slices.ContainsFunc(parts, func(p []string) bool { has, ok := fields[p[1]]; return ok && asText(has) != unquote(p[2]) }) {
			return strconv.Itoa(i)
		}
	}
	return ""
}

func asText(value any) string { return fmt.Sprint(value) }

func unquote(text string) string {
	if plain, err := strconv.Unquote(text); err == nil {
		return plain
	}
	return text
}
