// Command polymesh-scanner is Grype and Syft in one file: `polymesh-scanner grype …` and `polymesh-scanner syft …` are
// their own command lines, complete. Grype is built on Syft, so the second program costs next to nothing.
package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/anchore/clio"
	grype "github.com/anchore/grype/cmd/grype/cli"
	syft "github.com/anchore/syft/cmd/syft/cli"
	_ "github.com/glebarez/sqlite" // the driver of Grype's database, and of Syft for RPM's
)

func main() {
	programs := map[string]func(clio.Identification) clio.Application{"grype": grype.Application, "syft": syft.Application}
	if len(os.Args) < 2 || programs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "polymesh-scanner: say which program: grype or syft. `polymesh image scan` calls it")
		os.Exit(1)
	}
	name := os.Args[1]
	// Each reads its command line from os.Args, as the program that it is.
	os.Args = os.Args[1:]
	programs[name](clio.Identification{Name: name, Version: version(name)}).Run()
}

// version is that of the module, which the build records.
func version(name string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == "github.com/anchore/"+name {
			return dep.Version
		}
	}
	return "unknown"
}
