module polymesh.dev/polymesh/test/e2e/scenarios/supply-chain/greeter

go 1.26.8

require golang.org/x/text v0.3.7
