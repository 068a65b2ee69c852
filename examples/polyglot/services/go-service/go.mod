module polymesh.dev/polymesh/examples/polyglot/go-service

go 1.26
