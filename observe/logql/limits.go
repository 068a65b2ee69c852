package logql

import (
	"fmt"
	"regexp"
	"regexp/syntax"
)

// Limits on a query that are the same for everybody: what a query is made of. Limits on what it may read and give are in Limits.
const (
	maxQuery  = 64 << 10 // bytes
	maxTokens = 16 << 10
	maxNested = 64 // brackets
	maxStages = 128

	// What the store takes in one selector.
	maxMatchers     = 64
	maxMatcherBytes = 8 << 10

	// The size of a regular expression is counted in the states of its automaton, about one for each character.
	maxLineRegexp  = 5_000
	maxLabelRegexp = 50_000 // a dashboard's "all" is a long list of alternatives

	maxLabels    = 256 // of a record
	maxLabelName = 256 // bytes, of what a parser finds
	maxJSONDepth = 64

	maxTemplate        = 8 << 10   // bytes
	maxTemplateOutput  = 256 << 10 // bytes of one text
	maxTemplateMade    = 4 << 20   // bytes of all texts for one line
	maxTemplateRounds  = 10_000
	maxTemplateRegexps = 32
	maxTemplateZones   = 32
)

// compileRegexp compiles an expression if its automaton is not too large.
func compileRegexp(text string, most int) (*regexp.Regexp, error) {
	if err := checkRegexp(text, most); err != nil {
		return nil, err
	}
	return regexp.Compile(text)
}

// checkRegexp says whether an expression can be compiled, and its automaton is not too large. It does not compile: that is what must not happen.
func checkRegexp(text string, most int) error {
	re, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return err
	}
	if regexpSize(re, most) > most {
		return fmt.Errorf("the regular expression %q is too large", clip(text))
	}
	return nil
}

// regexpSize estimates how many states an expression has. It stops counting when there are more than enough.
func regexpSize(re *syntax.Regexp, most int) int {
	size := 1
	switch re.Op {
	case syntax.OpLiteral:
		size = len(re.Rune)
	case syntax.OpCharClass:
		size = 1 + len(re.Rune)/16
	}
	for _, sub := range re.Sub {
		if size += regexpSize(sub, most); size > most {
			break
		}
	}
	if re.Op == syntax.OpRepeat {
		size *= max(re.Min, re.Max, 1)
	}
	return min(size, most+1)
}
