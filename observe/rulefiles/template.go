package rulefiles

import (
	"errors"
	"fmt"
	"regexp"
	"text/template/parse"
)

// functions are the functions of Prometheus' templates that users may call. The result of each is at most as long as its arguments
// plus a few bytes: a line of nested calls that each double their argument would fill the memory. "query" is left out, as it would be
// evaluated for each alert.
var functions = map[string]bool{
	"humanize": true, "humanize1024": true, "humanizeDuration": true, "humanizePercentage": true, "humanizeTimestamp": true,
	"toTime": true, "now": true, "parseDuration": true, "title": true, "toUpper": true, "toLower": true,
	"stripPort": true, "stripDomain": true, "match": true, "printf": true,
	"and": true, "or": true, "not": true, "len": true, "index": true, "eq": true, "ne": true, "lt": true, "le": true, "gt": true, "ge": true,
}

// prefix declares the variables that Prometheus declares.
const prefix = `{{$labels := .Labels}}{{$externalLabels := .ExternalLabels}}{{$externalURL := .ExternalURL}}{{$value := .Value}}`

// format matches the allowed formats of printf: verbs that do not escape, and small widths.
var format = regexp.MustCompile(`^"(?:[^%\\]|%%|\\[n"t]|%[-+ 0]?[0-9]{0,2}(?:\.[0-9]{1,2})?[dfgesvt])*"$`)

// checkTemplate refuses a template with a result or time that its text does not bound: loops, and functions that repeat.
func checkTemplate(text string) error {
	tree := parse.New("text")
	tree.Mode = parse.SkipFuncCheck
	all := map[string]*parse.Tree{}
	if _, err := tree.Parse(prefix+text, "", "", all); err != nil {
		return err
	}
	if len(all) > 1 {
		return errors.New("define and block are not allowed in templates")
	}
	return checkNodes(tree.Root.Nodes[4:])
}

func checkNodes(nodes []parse.Node) error {
	for _, n := range nodes {
		if err := checkNode(n); err != nil {
			return err
		}
	}
	return nil
}

func checkNode(n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		if n == nil {
			return nil
		}
		return checkNodes(n.Nodes)
	case *parse.IfNode:
		return errors.Join(checkNode(n.Pipe), checkNode(n.List), checkNode(n.ElseList))
	case *parse.ActionNode:
		return checkNode(n.Pipe)
	case *parse.PipeNode:
		if len(n.Decl) > 0 {
			return errors.New("variables are not allowed in templates")
		}
		for _, c := range n.Cmds {
			if err := checkNode(c); err != nil {
				return err
			}
		}
		return nil
	case *parse.CommandNode:
		if id, ok := n.Args[0].(*parse.IdentifierNode); ok && id.Ident == "printf" {
			if len(n.Args) < 2 {
				return errors.New("printf needs a format in templates")
			}
			if s, ok := n.Args[1].(*parse.StringNode); !ok || !format.MatchString(s.Quoted) {
				return errors.New("printf needs a format with only %d, %f, %g, %e, %s, %v or %t and widths below 100 in templates")
			}
		}
		return checkNodes(n.Args)
	case *parse.IdentifierNode:
		if !functions[n.Ident] {
			return fmt.Errorf("the function %q is not allowed in templates", n.Ident)
		}
		return nil
	case *parse.ChainNode:
		return checkNode(n.Node)
	case *parse.TextNode, *parse.CommentNode, *parse.VariableNode, *parse.FieldNode, *parse.DotNode, *parse.StringNode, *parse.NumberNode, *parse.BoolNode, *parse.NilNode:
		return nil
	}
	return fmt.Errorf("%.50q is not allowed in templates", n.String())
}
