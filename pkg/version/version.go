// Package version holds the version of Polymesh itself. The build stamps it by -ldflags; every command that prints
// versions reads it here.
package version

// Version is the release of Polymesh, without a leading v.
var Version = "dev"
