package command

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

// printServers prints the API servers that an agent knows.
func printServers(w io.Writer, servers []status.APIServer) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "\nAPI SERVER\tSTATE\tCONNECTIONS\tMESSAGE")
	for _, s := range servers {
		state := "healthy"
		switch {
		case s.Problem != "":
			state = "away"
		case s.Current:
			state = "connected"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\n", s.Address, state, s.Connections, progress.Line(s.Problem))
	}
	return t.Flush()
}

// printCluster prints the state of the cluster.
func printCluster(w io.Writer, c *status.Cluster, now time.Time) error {
	fmt.Fprintln(w)
	if c.Problem != "" {
		fmt.Fprintf(w, "The cluster does not work: %s\n\n", progress.Line(c.Problem))
	}
	if len(c.Nodes) > 0 {
		if err := printNodes(w, c.Nodes, now); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	if len(c.Datastore.Members) > 0 {
		if err := printMembers(w, c.Datastore.Members); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	line := func(name string, parts ...string) {
		if text := strings.Join(parts, ", "); text != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, progress.Line(text))
		}
	}
	line("datastore", describeDatastore(c.Datastore, now)...)
	var leaders []string
	for _, l := range c.Leaders {
		holder := orDash(l.Holder)
		if l.Expired {
			holder += " (not renewed for " + duration.HumanDuration(now.Sub(l.Renewed)) + ")"
		}
		leaders = append(leaders, l.Lease+" "+holder)
	}
	line("leaders", leaders...)
	var next []string
	for _, e := range c.Certificates {
		of := " of " + e.Node
		if e.Authority {
			of = ", an authority,"
		}
		next = append(next, fmt.Sprintf("%s%s in %s", e.Name, of, duration.HumanDuration(e.Expires.Sub(now))))
	}
	line("certificates", prefixed("next to expire: ", next)...)
	if s := c.Snapshot; s != nil {
		last := "none in this server's folder"
		if s.File != "" {
			last = fmt.Sprintf("%s, %s ago, %s", s.File, duration.HumanDuration(now.Sub(s.Created)), kib(s.Size))
		}
		if s.Failure != "" {
			last += "; the last scheduled one failed: " + s.Failure
		}
		line("last snapshot", last)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, warning := range c.Warnings {
		fmt.Fprintln(w, "! "+progress.Line(warning))
	}
	for _, unknown := range c.Unknown {
		fmt.Fprintln(w, "? "+progress.Line(unknown))
	}
	return nil
}

func prefixed(prefix string, parts []string) []string {
	if len(parts) > 0 {
		parts[0] = prefix + parts[0]
	}
	return parts
}

func describeDatastore(d status.Datastore, now time.Time) []string {
	parts := []string{d.Kind}
	if d.Size > 0 {
		parts = append(parts, mib(uint64(d.Size)))
	}
	if d.Rows > 0 {
		parts = append(parts, fmt.Sprintf("%d rows", d.Rows))
	}
	if d.Revision > 0 {
		parts = append(parts, fmt.Sprintf("revision %d", d.Revision))
	}
	if d.Compacted > 0 {
		parts = append(parts, fmt.Sprintf("compacted to revision %d", d.Compacted))
	}
	if !d.LastCompaction.IsZero() {
		parts = append(parts, fmt.Sprintf("%s ago", duration.HumanDuration(now.Sub(d.LastCompaction))))
	}
	return parts
}
