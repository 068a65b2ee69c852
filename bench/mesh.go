package main

import "fmt"

// latencyMatrix has a line for each rate and way.
func latencyMatrix() matrix {
	m := matrix{heads: []string{"requests of 1 KB", "p50, ms", "p90, ms", "p99, ms", "answers per second"}}
	for _, rate := range rates {
		for _, w := range ways {
			m.lines = append(m.lines, line{
				fmt.Sprintf("%d per second: %s", rate, w.what),
				[]figureID{w.figure(rate, "p50"), w.figure(rate, "p90"), w.figure(rate, "p99"), w.figure(rate, "reached")},
			})
		}
	}
	return m
}

func mostRows() []row {
	var rows []row
	for _, w := range ways {
		rows = append(rows, row{w.most(), w.what, "requests per second", "", ""})
	}
	return rows
}

var statsLoggerRows = []row{
	{"stats logger: client CPU", "share of the client's Envoy's CPU", "%", "", ""},
	{"stats logger: server CPU", "share of the server's Envoy's CPU", "%", "", ""},
}

// costMatrix has a line for each Envoy at each rate.
func costMatrix() matrix {
	m := matrix{heads: []string{"Envoy", "CPU, cores for 1,000 requests per second", "RSS, MB", "anonymous, MB"}}
	for _, rate := range rates {
		for _, w := range ways {
			for _, e := range w.Ends() {
				if e.Sidecar {
					m.lines = append(m.lines, line{
						fmt.Sprintf("%d per second, at the %s: %s", rate, e.Name, w.what),
						[]figureID{w.figure(rate, e.Name+" CPU"), w.figure(rate, e.Name+" RSS"), w.figure(rate, e.Name+" anonymous")},
					})
				}
			}
		}
	}
	return m
}
