package rowstore

import (
	"flag"
	"fmt"
	"os"
	"runtime"
)

// maxProcs is how many processors the program uses, however many there are, unless GOMAXPROCS in its environment says otherwise.
const maxProcs = 2

// LimitMemory sets what the storage library may use for its caches and for the state of one query, and quiets its log to warnings. The library
// takes both from the global flags that it registers, and ends the program if they were never parsed: so this parses an empty command line
// unless the program has parsed its own: tests call flag.Parse first. main calls it once, before the first Open.
//
// It also bounds the number of processors: the library's compressor keeps 16 MiB for each, which no limit of it covers, and Go counts them towards
// GOMEMLIMIT. On a machine with 16 processors the garbage collector would have nothing else to do.
func LimitMemory(bytes int64) error {
	for name, value := range map[string]string{
		"memory.allowedBytes": fmt.Sprint(bytes),
		"loggerLevel":         "WARN",
	} {
		if err := flag.CommandLine.Set(name, value); err != nil {
			return fmt.Errorf("setting the storage library's -%s to %s: %w", name, value, err)
		}
	}
	if os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) > maxProcs {
		runtime.GOMAXPROCS(maxProcs)
	}
	if !flag.Parsed() {
		if err := flag.CommandLine.Parse(nil); err != nil {
			return fmt.Errorf("marking the storage library's flags as parsed: %w", err)
		}
	}
	return nil
}
