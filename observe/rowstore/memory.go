package rowstore

import (
	"flag"
	"fmt"
	"runtime"

	"github.com/VictoriaMetrics/VictoriaMetrics/lib/encoding"
)

// LimitMemory sets the library's limits for its caches and for the state of one query, and reduces its log to warnings. The library
// takes both from the global flags that it registers, and ends the program if they were never parsed: so this parses an empty command line
// unless the program has parsed its own: tests call flag.Parse first. main calls it once, before the first Open.
func LimitMemory(bytes int64) error {
	for name, value := range map[string]string{
		"memory.allowedBytes": fmt.Sprint(bytes),
		"loggerLevel":         "WARN",
	} {
		if err := flag.CommandLine.Set(name, value); err != nil {
			return fmt.Errorf("setting the storage library's -%s to %s: %w", name, value, err)
		}
	}
	if !flag.Parsed() {
		if err := flag.CommandLine.Parse(nil); err != nil {
			return fmt.Errorf("marking the storage library's flags as parsed: %w", err)
		}
	}
	// One compressor of each level, instead of one for each processor: it keeps 16 MiB that no limit covers. The library makes them for as many processors
	// as there are when it compresses first.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for _, level := range []int{1, 3} {
		encoding.CompressZSTDLevel(nil, []byte{0}, level)
	}
	return nil
}
