package dialect

import (
	"regexp"
	"testing"
)

// FuzzExpression: for any label expression, Envoy parses the commands of the resulting format as intended, and each CEL
// expression in it is valid.
func FuzzExpression(f *testing.F) {
	for _, seed := range []string{
		`string(destination.port)`, `request.method + ":" + request.url_path`, `"a)% b"`, `'%' in request.headers ? ")%" : "):3%"`,
		`request.headers["x"].matches("^(a|b)[c-é]+$")`, `has(request.host)`, `(response.code)%7`, `re.extract(node.id, "a", r'\1')`,
		`filter_state.upstream_peer.version == "v1"`, `"\n\u00e9" + b"\xff"`,
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	// Commands are extracted as in Envoy's source/common/formatter/substitution_formatter.cc.
	command := regexp.MustCompile(`^%(%|([A-Z_]+)(?:\((.*?)\))?(?::\d+)?%)`)
	f.Fuzz(func(t *testing.T, expression string, inbound bool) {
		format := formatOfExpression(&surroundings{within: within{inbound: inbound}}, expression)
		for rest := format; rest != ""; {
			if rest[0] != '%' {
				rest = rest[1:]
				continue
			}
			m := command.FindStringSubmatch(rest)
			if m == nil {
				t.Fatalf("%q became %q, in which %q is not a command", expression, format, rest)
			}
			rest = rest[len(m[0]):]
			if m[2] != "CEL" {
				continue
			}
			if _, err := parse(m[3]); err != nil {
				t.Fatalf("%q became %q, in which %q cannot be parsed: %v", expression, format, m[3], err)
			}
		}
	})
}
