package dialect

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// attributes are the CEL expressions of the Telemetry API that a format string can stand for.
var attributes = map[string]string{
	"request.host":      "%REQ(:AUTHORITY)%",
	"request.method":    "%REQ(:METHOD)%",
	"request.path":      "%REQ(:PATH)%",
	"request.scheme":    "%REQ(:SCHEME)%",
	"request.protocol":  "%PROTOCOL%",
	"request.useragent": "%REQ(USER-AGENT)%",
	"response.code":     "%RESPONSE_CODE%",
}

var headerExpression = regexp.MustCompile(`^(request|response)\.headers\[["']([A-Za-z0-9_-]+)["']\]$`)

// attribute is a CEL expression that only selects: Envoy compiles any of them, and what is not there has no value. One that
// it could not compile would cost the whole listener.
var attribute = regexp.MustCompile(`^(request|response|connection|source|destination|upstream)(\.[a-z_]+)+(\[["'][A-Za-z0-9_.-]+["']\])?$`)

// formatOfExpression turns the value of a tag override into a format string. Anything but text, a header or an attribute
// is counted as unknown, as Istio does with an expression that fails.
func formatOfExpression(expression string) string {
	expression = strings.TrimSpace(expression)
	if format, ok := attributes[expression]; ok {
		return format
	}
	if m := headerExpression.FindStringSubmatch(expression); m != nil {
		if m[1] == "request" {
			return "%REQ(" + m[2] + ")%"
		}
		return "%RESP(" + m[2] + ")%"
	}
	if attribute.MatchString(expression) {
		return "%CEL(" + expression + ")%"
	}
	if n := len(expression); n >= 2 && expression[0] == '\'' && expression[n-1] == '\'' && !strings.ContainsAny(expression[1:n-1], `'\"`) {
		expression = `"` + expression[1:n-1] + `"`
	}
	if literal, err := strconv.Unquote(expression); err == nil && strings.HasPrefix(expression, `"`) {
		return strings.ReplaceAll(literal, "%", "%%")
	}
	return unknown
}

func sortedKeys(m map[string]string) []string {
	return slices.Sorted(maps.Keys(m))
}
