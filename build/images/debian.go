package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// debian reads Debian packages, which build/debian/fetch has downloaded and checked.
type debian struct {
	dir string
}

// unpack adds the files of a package to the tree, without running its maintainer scripts. The calling functions do what
// these would have done. The package's description goes to /var/lib/dpkg/status.d, where scanners
// look for it in images without a package manager, such as distroless images.
func (d debian) unpack(ctx context.Context, t tree, name string) error {
	file := filepath.Join(d.dir, name+".deb")
	if err := d.read(ctx, t, "--fsys-tarfile", file); err != nil {
		return fmt.Errorf("unpack %s: %w", file, err)
	}
	control := tree{}
	if err := d.read(ctx, control, "--ctrl-tarfile", file); err != nil {
		return fmt.Errorf("read the description of %s: %w", file, err)
	}
	description, ok := control["control"]
	if !ok {
		return fmt.Errorf("%s has no control file", file)
	}
	t.text("var/lib/dpkg/status.d/"+name, string(description.content))
	if sums, ok := control["md5sums"]; ok {
		t.text("var/lib/dpkg/status.d/"+name+".md5sums", string(sums.content))
	}
	return nil
}

func (d debian) read(ctx context.Context, t tree, mode, file string) error {
	command := exec.CommandContext(ctx, "dpkg-deb", mode, file)
	var complaint bytes.Buffer
	command.Stderr = &complaint
	content, err := command.Output()
	if err != nil {
		return fmt.Errorf("run dpkg-deb: %w: %s", err, complaint.String())
	}
	reader := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read its tar file: %w", err)
		}
		data, err := io.ReadAll(reader)
		if err != nil {
			return fmt.Errorf("read %s in it: %w", header.Name, err)
		}
		t.put(*header, data)
	}
}

// certificates adds the authorities of ca-certificates and the bundle that update-ca-certificates creates from them.
func (d debian) certificates(ctx context.Context, t tree) error {
	if err := d.unpack(ctx, t, "ca-certificates"); err != nil {
		return err
	}
	var names []string
	for name := range t {
		if strings.HasPrefix(name, "usr/share/ca-certificates/") && strings.HasSuffix(name, ".crt") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var bundle bytes.Buffer
	for _, name := range names {
		bundle.Write(bytes.TrimRight(t[name].content, "\n"))
		bundle.WriteByte('\n')
	}
	t.text("etc/ssl/certs/ca-certificates.crt", bundle.String())
	// Programs read the bundle; the single files would double the size.
	t.drop(func(name string, _ bool) bool {
		return strings.HasPrefix(name, "usr/share/ca-certificates") || strings.HasPrefix(name, "usr/sbin") ||
			strings.HasPrefix(name, "etc/ca-certificates")
	})
	t.drop(forReaders)
	return nil
}

// busybox adds the static busybox and a link for each of its commands, unless another program has that path.
func (d debian) busybox(ctx context.Context, t tree) error {
	if err := d.unpack(ctx, t, "busybox-static"); err != nil {
		return err
	}
	list, err := d.commands(ctx, t)
	if err != nil {
		return err
	}
	for _, name := range list {
		if _, taken := t[name]; !taken {
			t.link(name, "/"+busyboxProgram)
		}
	}
	t.drop(forReaders)
	return nil
}

// iptables sets the alternatives like Debian's postinst: the commands without a flavor are the nf_tables ones.
// istio-iptables looks for the names iptables-legacy, iptables-nft and iptables, in this order (DetectIptablesVersion in
// tools/istio-iptables/pkg/dependencies), so both flavors also exist under their own names.
func (d debian) iptables(ctx context.Context, t tree) error {
	for _, name := range []string{
		"iptables", "libip4tc2", "libip6tc2", "libxtables12", "libnetfilter-conntrack3", "libnfnetlink0", "netbase",
		"nftables", "libnftables1", "libnftnl11", "libmnl0", "libjansson4", "libgmp10", "libedit2", "libbsd0", "libmd0", "libtinfo6",
	} {
		if err := d.unpack(ctx, t, name); err != nil {
			return err
		}
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, command := range []string{"", "-save", "-restore"} {
			t.link("usr/sbin/"+family+command, family+"-nft"+command)
		}
	}
	t.drop(forReaders)
	return nil
}

// forReaders are documentation and translations. Copyright files stay.
func forReaders(name string, directory bool) bool {
	if strings.HasSuffix(name, "/copyright") {
		return false
	}
	for _, prefix := range []string{"usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bug", "usr/share/initramfs-tools"} {
		if name == prefix || strings.HasPrefix(name, prefix+"/") {
			return true
		}
	}
	return strings.HasPrefix(name, "usr/share/doc/") && !directory
}
