// The portable program checks that the shipped programs do not depend on the host: every program in the shipped file, and
// the file itself, has no ELF interpreter and no dynamic section, so neither the C library of Ubuntu 20.04 nor that of
// RHEL 8 matters. Programs that Debian built dynamically are in bin/lib with their own loader; there, every needed library
// must exist too. It then runs the file in an empty root directory. `make check-portable` calls it.
package main

import (
	"archive/zip"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"
)

// oldestKernel is RHEL 8's. A C library refuses to start on a kernel older than the one in its ABI note.
const oldestKernel = 4<<16 | 18<<8

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: portable <shipped file>")
		os.Exit(2)
	}
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "portable:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, shipped string) error {
	archive, err := zip.OpenReader(shipped)
	if err != nil {
		return fmt.Errorf("open %s: %w", shipped, err)
	}
	defer archive.Close()
	archive.RegisterDecompressor(zstd.ZipMethodWinZip, zstd.ZipDecompressor())

	libraries := map[string]bool{"ld-linux-x86-64.so.2": true}
	for _, member := range archive.File {
		if path.Dir(member.Name) == "bin/lib" {
			libraries[path.Base(member.Name)] = true
		}
	}
	var complaints []error
	check := func(name string, content []byte) {
		if err := portable(name, content, libraries); err != nil {
			complaints = append(complaints, fmt.Errorf("%s: %w", name, err))
		}
	}
	launcher, err := os.ReadFile(shipped)
	if err != nil {
		return fmt.Errorf("read %s: %w", shipped, err)
	}
	check(shipped, launcher)
	checked := 1
	for _, member := range archive.File {
		if !strings.HasPrefix(member.Name, "bin/") {
			continue
		}
		content, err := read(member)
		if err != nil {
			return fmt.Errorf("read %s: %w", member.Name, err)
		}
		check(member.Name, content)
		checked++
	}
	if len(complaints) > 0 {
		return errors.Join(complaints...)
	}
	fmt.Printf("%d ELF files need nothing of the host and no kernel newer than 4.18\n", checked)
	return emptyRoot(ctx, shipped)
}

func read(member *zip.File) ([]byte, error) {
	file, err := member.Open()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(file)
}

func portable(name string, content []byte, libraries map[string]bool) error {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("read it as ELF: %w", err)
	}
	if err := kernel(file); err != nil {
		return err
	}
	if strings.HasPrefix(name, "bin/lib/") {
		needed, err := file.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("read what it needs: %w", err)
		}
		for _, library := range needed {
			if !libraries[library] {
				return fmt.Errorf("needs %s, which is not in bin/lib", library)
			}
		}
		return nil
	}
	for _, segment := range file.Progs {
		switch segment.Type {
		case elf.PT_INTERP:
			return errors.New("has an ELF interpreter: it is not static")
		case elf.PT_DYNAMIC:
			return errors.New("has a dynamic section: it is not static")
		}
	}
	return nil
}

// kernel reads the ABI note: type 1, owner GNU, an operating system (0 is Linux) and the oldest kernel in three numbers.
func kernel(file *elf.File) error {
	section := file.Section(".note.ABI-tag")
	if section == nil {
		return nil // Go programs have none
	}
	note, err := section.Data()
	if err != nil {
		return fmt.Errorf("read its ABI note: %w", err)
	}
	if len(note) < 32 {
		return errors.New("its ABI note is too short")
	}
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(note[16+4*i:]) }
	if oldest := word(1)<<16 | word(2)<<8 | word(3); oldest > oldestKernel {
		return fmt.Errorf("wants kernel %d.%d.%d or newer", word(1), word(2), word(3))
	}
	return nil
}

// emptyRoot runs `polymesh version` in a root with only the file, /proc and an empty /tmp.
func emptyRoot(ctx context.Context, shipped string) (err error) {
	if os.Geteuid() != 0 {
		fmt.Println("not root: the run in an empty root directory is left out")
		return nil
	}
	root, err := os.MkdirTemp("", "empty-root-")
	if err != nil {
		return fmt.Errorf("make an empty root: %w", err)
	}
	defer os.RemoveAll(root)
	for _, directory := range []string{"proc", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, directory), 0o777); err != nil {
			return fmt.Errorf("make an empty root: %w", err)
		}
	}
	content, err := os.ReadFile(shipped)
	if err != nil {
		return fmt.Errorf("copy the file: %w", err)
	}
	if err := os.WriteFile(filepath.Join(root, "polymesh"), content, 0o755); err != nil {
		return fmt.Errorf("copy the file: %w", err)
	}
	proc := filepath.Join(root, "proc")
	if err := syscall.Mount("proc", proc, "proc", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", proc, err)
	}
	defer func() { err = errors.Join(err, syscall.Unmount(proc, 0)) }()
	command := exec.CommandContext(ctx, "/polymesh", "version")
	command.Dir = "/"
	command.Env = []string{"HOME=/tmp"}
	command.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := command.CombinedOutput()
	if err != nil {
		return fmt.Errorf("run `polymesh version` in an empty root: %w: %s", err, out)
	}
	fmt.Printf("`polymesh version` in an empty root:\n%s", out)
	return nil
}
