/*
 * Starts a Debian program with the libraries that were shipped with it, so that it runs on every distribution.
 *
 * Debian has no static nft or iptables. This file is static; the payload holds it once for each name:
 *
 *	bin/nft                      this program
 *	bin/lib/nft                  Debian's program
 *	bin/lib/ld.so, lib*.so.*     its dynamic loader and libraries
 *	bin/lib/xtables/             the extensions of iptables
 *
 * The loader is told where the libraries are (see ld.so(8)); nothing of the host's C library is used.
 */
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One file of Debian's iptables package holds all of its commands and looks at the name it was started under. */
#define XTABLES "xtables-nft-multi"

static int fail(const char *what) {
	perror(what);
	return 127;
}

int main(int argc, char **argv) {
	char self[PATH_MAX], copy[PATH_MAX], lib[PATH_MAX + 32], loader[PATH_MAX + 64], program[PATH_MAX + 64], xtables[PATH_MAX + 64];

	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
	if (n < 0)
		return fail("read /proc/self/exe");
	self[n] = '\0';
	strcpy(copy, self);
	const char *name = basename(copy);
	char *directory = dirname(self);

	snprintf(lib, sizeof lib, "%s/lib", directory);
	snprintf(loader, sizeof loader, "%s/ld.so", lib);
	snprintf(xtables, sizeof xtables, "%s/xtables", lib);
	snprintf(program, sizeof program, "%s/%s", lib, strcmp(name, "nft") == 0 ? "nft" : XTABLES);

	/* Both would put the host's libraries before ours. */
	unsetenv("LD_PRELOAD");
	unsetenv("LD_AUDIT");
	if (setenv("XTABLES_LIBDIR", xtables, 1) != 0)
		return fail("set XTABLES_LIBDIR");

	char **args = calloc(argc + 8, sizeof *args);
	if (args == NULL)
		return fail("start");
	int i = 0;
	args[i++] = loader;
	args[i++] = "--inhibit-cache";
	args[i++] = "--library-path";
	args[i++] = lib;
	args[i++] = "--argv0";
	args[i++] = (char *)name;
	args[i++] = program;
	for (int a = 1; a < argc; a++)
		args[i++] = argv[a];
	execv(loader, args);
	return fail(loader);
}
