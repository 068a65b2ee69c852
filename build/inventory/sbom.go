package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeSBOM writes the parts as CycloneDX 1.6. There is no serial number: it would be another with every build.
func writeSBOM(file, subject, version, date string, parts []component) error {
	sum, err := hash(subject)
	if err != nil {
		return err
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{
		Timestamp: date,
		Component: &cdx.Component{
			BOMRef: "polymesh", Type: cdx.ComponentTypeApplication, Name: filepath.Base(subject), Version: version,
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: sum}},
		},
	}
	var components []cdx.Component
	var references []string
	for _, p := range parts {
		c := cdx.Component{BOMRef: p.purl, Type: cdx.ComponentTypeLibrary, Name: p.name, Version: p.version, PackageURL: p.purl, Description: p.note}
		if p.kind == "generic" {
			c.Type = cdx.ComponentTypeApplication
		}
		if p.sha256 != "" {
			c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: p.sha256}}
		}
		if p.sha512 != "" {
			c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA512, Value: p.sha512}}
		}
		if len(p.licenses) > 0 {
			var licenses cdx.Licenses
			for _, name := range p.licenses {
				license := &cdx.License{ID: name}
				if name == publicDomain {
					license = &cdx.License{Name: name}
				}
				licenses = append(licenses, cdx.LicenseChoice{License: license})
			}
			c.Licenses = &licenses
		}
		properties := []cdx.Property{{Name: "polymesh:in", Value: strings.Join(p.users, ",")}}
		if p.h1 != "" {
			properties = append(properties, cdx.Property{Name: "polymesh:go.sum", Value: p.h1})
		}
		c.Properties = &properties
		components = append(components, c)
		references = append(references, p.purl)
	}
	bom.Components = &components
	bom.Dependencies = &[]cdx.Dependency{{Ref: "polymesh", Dependencies: &references}}

	out, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("write the bill of materials: %w", err)
	}
	encoder := cdx.NewBOMEncoder(out, cdx.BOMFileFormatJSON).SetPretty(true)
	if err := encoder.EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		out.Close()
		return fmt.Errorf("write the bill of materials: %w", err)
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("write the bill of materials: %w", err)
	}
	return nil
}

func hash(name string) (string, error) {
	file, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("hash: %w", err)
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		return "", fmt.Errorf("hash %s: %w", name, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
