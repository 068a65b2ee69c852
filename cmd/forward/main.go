// The forward program runs in the pods that give a cluster access to the store of metrics, logs and traces: it passes connections on
// from ports to UNIX sockets (pkg/forward).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"polymesh.dev/polymesh/pkg/forward"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "forward:", err)
		}
		os.Exit(2)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("forward", flag.ContinueOnError)
	ready := flags.Uint("ready-port", 8080, "port that is open while a socket accepts connections")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: forward [flags] PORT=SOCKET ...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *ready == 0 || *ready > 65535 {
		return fmt.Errorf("--ready-port %d is not a port", *ready)
	}
	if flags.NArg() == 0 {
		return errors.New("give at least one PORT=SOCKET")
	}
	o := forward.Options{Ready: uint16(*ready), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	for _, text := range flags.Args() {
		route, err := forward.ParseRoute(text)
		if err != nil {
			return err
		}
		o.Routes = append(o.Routes, route)
	}
	f, err := forward.Listen(o)
	if err != nil {
		return err
	}
	f.Run(ctx)
	return nil
}
