// Package version holds the version of Polymesh itself. The build sets it by -ldflags; every command that prints
// versions uses it.
package version

// Version is the release of Polymesh, without a leading v.
var Version = "dev"
