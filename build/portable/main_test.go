package main

import (
	"archive/zip"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// compile builds a real program or library in C.
func compile(t *testing.T, source string, args ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	in, out := filepath.Join(dir, "main.c"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := exec.Command("gcc", append([]string{in, "-o", out}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v: %s", strings.Join(args, " "), err, text)
	}
	content, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

const (
	hello   = "#include <stdio.h>\nint main(void) { puts(\"polymesh 1.2.3\"); return 0; }\n"
	library = "#include <stdio.h>\nvoid greet(void) { puts(\"hello\"); }\n"
)

func TestPortable(t *testing.T) {
	libraries := map[string]bool{"ld-linux-x86-64.so.2": true, "libc.so.6": true}
	static := compile(t, hello, "-static")
	dynamic := compile(t, hello)
	shared := compile(t, library, "-shared", "-fPIC")
	for _, c := range []struct {
		what, name string
		content    []byte
		libraries  map[string]bool
		want       string
	}{
		{"a static program", "bin/pause", static, libraries, ""},
		{"a dynamic program", "bin/pause", dynamic, libraries, "has an ELF interpreter"},
		{"a position-independent program without interpreter", "bin/pause", compile(t, hello, "-static-pie"), libraries, "has a dynamic section"},
		{"a dynamic program beside its loader", "bin/lib/nft", dynamic, libraries, ""},
		{"a library beside those it needs", "bin/lib/libgreet.so", shared, libraries, ""},
		{"a library without those it needs", "bin/lib/libgreet.so", shared, map[string]bool{}, "needs libc.so.6, which is not in bin/lib"},
		{"a program for a newer kernel", "bin/pause", withKernel(t, static, 6, 1, 0), libraries, "wants kernel 6.1.0 or newer"},
		{"a program for the oldest kernel", "bin/pause", withKernel(t, static, 4, 18, 0), libraries, ""},
		{"a program for one kernel later", "bin/pause", withKernel(t, static, 4, 18, 1), libraries, "wants kernel 4.18.1 or newer"},
		{"a library for a newer kernel", "bin/lib/nft", withKernel(t, dynamic, 5, 0, 0), libraries, "wants kernel 5.0.0 or newer"},
		{"a script", "bin/up", []byte("#!/bin/sh\nexit 0\n"), libraries, "read it as ELF"},
		{"half a program", "bin/pause", static[:40], libraries, "read it as ELF"},
		{"nothing", "bin/pause", nil, libraries, "read it as ELF"},
	} {
		t.Run(c.what, func(t *testing.T) {
			err := portable(c.name, c.content, c.libraries)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// withKernel writes another oldest kernel into a program's ABI note.
func withKernel(t *testing.T, program []byte, version ...uint32) []byte {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	section := file.Section(".note.ABI-tag")
	if section == nil {
		t.Fatal("the C library of this machine writes no ABI note")
	}
	changed := bytes.Clone(program)
	for i, number := range version {
		binary.LittleEndian.PutUint32(changed[int(section.Offset)+20+4*i:], number)
	}
	return changed
}

// ship appends members to a launcher, as build/payload does.
func ship(t *testing.T, launcher []byte, members map[string][]byte) string {
	t.Helper()
	out := bytes.NewBuffer(bytes.Clone(launcher))
	w := zip.NewWriter(out)
	w.SetOffset(int64(len(launcher)))
	for name, content := range members {
		member, err := w.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := member.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "polymesh")
	if err := os.WriteFile(name, out.Bytes(), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestRun(t *testing.T) {
	static, dynamic := compile(t, hello, "-static"), compile(t, hello)
	if err := run(t.Context(), ship(t, static, map[string][]byte{"bin/a": static, "images/polymesh.tar": []byte("no ELF")})); err != nil {
		t.Errorf("a file of static programs is refused: %v", err)
	}
	err := run(t.Context(), ship(t, static, map[string][]byte{"bin/a": dynamic, "bin/cni/b": []byte("#!/bin/sh"), "bin/c": static}))
	if err == nil || !strings.Contains(err.Error(), "bin/a: has an ELF interpreter") || !strings.Contains(err.Error(), "bin/cni/b: read it as ELF") || strings.Contains(err.Error(), "bin/c:") {
		t.Errorf("both programs should be named, and no third: %v", err)
	}
	if err := run(t.Context(), ship(t, dynamic, map[string][]byte{"bin/a": static})); err == nil || !strings.Contains(err.Error(), "has an ELF interpreter") {
		t.Errorf("a dynamic launcher: %v", err)
	}
}

// What needs a file of the host is found when it runs without one.
func TestEmptyRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can change the root directory")
	}
	needsPasswd := compile(t, "#include <stdio.h>\nint main(void) { return fopen(\"/etc/passwd\", \"r\") ? 0 : 3; }\n", "-static")
	err := emptyRoot(t.Context(), ship(t, needsPasswd, nil))
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a program that reads /etc/passwd: %v", err)
	}
}
