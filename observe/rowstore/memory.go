package rowstore

import (
	"flag"
	"fmt"
)

// LimitMemory sets what the storage library may use for its caches and for the state of one query, and quiets its log to warnings. The library
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
	return nil
}
