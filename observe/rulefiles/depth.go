package rulefiles

// MaxDepth is how deeply parentheses, brackets and braces of an expression may be nested. PromQL's parser and engine recurse into
// them, and their time grows with the square of the depth: seconds for thousands.
const MaxDepth = 100

// Depth returns how deeply the brackets of a PromQL expression are nested, without those in strings and comments. The text need not be valid.
func Depth(expr string) int {
	depth, deepest := 0, 0
	for i := 0; i < len(expr); i++ {
		switch c := expr[i]; c {
		case '(', '[', '{':
			depth++
			deepest = max(deepest, depth)
		case ')', ']', '}':
			depth--
		case '#':
			for i < len(expr) && expr[i] != '\n' {
				i++
			}
		case '"', '\'', '`':
			for i++; i < len(expr) && expr[i] != c; i++ {
				if expr[i] == '\\' && c != '`' {
					i++
				}
			}
		}
	}
	return deepest
}
