// Command run runs the end-to-end tests for `make test-e2e`: the test program that make has built, in parallel lanes. It needs root,
// and time.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"polymesh.dev/polymesh/test/e2e/lanes"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		os.Exit(1)
	}
}

func run() error {
	o := lanes.Options{
		Dir: filepath.Join("test", "e2e"), Package: "polymesh.dev/polymesh/test/e2e", Out: os.Stdout,
		Events: ".build/times/e2e.json", Durations: ".build/durations.json", Hints: "test/e2e/durations.json",
	}
	flag.StringVar(&o.Program, "program", ".build/test/e2e.test", "the compiled tests")
	flag.StringVar(&o.Run, "run", "", "only the tests whose names match this regular expression")
	flag.IntVar(&o.Lanes, "lanes", lanesHere(), "how many tests run at a time")
	flag.DurationVar(&o.Timeout, "timeout", 30*time.Minute, "the limit of a single test")
	flag.IntVar(&o.Repeat, "repeat", 0, "how many failed tests at most run once more")
	list := flag.Bool("list", false, "only list the tests, with what each one needs")
	flag.Parse()
	o.Args = flag.Args()
	program, err := filepath.Abs(o.Program)
	if err != nil {
		return err
	}
	o.Program = program
	if o.Lanes < 1 {
		return fmt.Errorf("-lanes %d: at least 1", o.Lanes)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if !*list {
		return lanes.Run(ctx, o)
	}
	tests, err := o.Plan(ctx)
	for _, t := range tests {
		fmt.Println(t)
	}
	return err
}

// lanesHere returns one lane for each core, limited by memory: a node with the mesh and the guide's app uses about four GiB. With
// three lanes, two cores are 97 % busy, and no more tests finish in the same time.
func lanesHere() int {
	const perLane = 5 << 30
	most := runtime.NumCPU()
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		return most
	}
	memory := info.Totalram * uint64(info.Unit)
	return max(1, min(most, int(memory/perLane)))
}
