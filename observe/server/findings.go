package server

import (
	"context"

	"polymesh.dev/polymesh/observe/findings"
)

// diagnoses is the name of the component that stores what is wrong in the cluster.
const diagnoses = "findings"

// keepFindings asks the server what is wrong in the cluster.
func (p *parts) keepFindings(context.Context) (Running, error) {
	c := findings.New(findings.Options{Socket: p.o.ServerSocket, Store: p.stores.logs, Log: p.log})
	return Running{Run: c.Run, Problem: c.Problem, Numbers: c.Numbers}, nil
}
