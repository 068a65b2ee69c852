// Command echo is the workload of the end-to-end tests: a server that shows what reached it, and the clients that call it
// from inside a pod. Its image holds nothing else, so that a test depends on no shell and no curl.
//
//	echo serve                                          HTTP, gRPC and TCP, see server.go
//	echo get [-H "Name: value"] [-n 100] [-c 10] [-r 50] URL    HTTP, see client.go
//	echo grpc ADDRESS
//	echo tcp ADDRESS TEXT
//	echo postgres URL SQL                       PostgreSQL, see postgres.go
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	commands := map[string]func(context.Context, []string) error{
		"serve":    serve,
		"get":      get,
		"grpc":     callGRPC,
		"tcp":      callTCP,
		"postgres": query,
	}
	if len(args) > 0 {
		if command, ok := commands[args[0]]; ok {
			return command(ctx, args[1:])
		}
	}
	return fmt.Errorf("say one of: serve, get URL, grpc ADDRESS, tcp ADDRESS TEXT, postgres URL SQL")
}
