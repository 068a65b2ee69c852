package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// npmPackages reads the packages that are in a page from a package-lock.json (https://docs.npmjs.com/cli/configuring-npm/package-lock-json), and
// their licences from where they were installed. Packages that only build or test the page are left out.
func npmPackages(lock, installed, user string) ([]component, error) {
	content, err := os.ReadFile(lock)
	if err != nil {
		return nil, fmt.Errorf("read the page's packages: %w", err)
	}
	var list struct {
		Version  int `json:"lockfileVersion"`
		Packages map[string]struct {
			Version   string `json:"version"`
			Integrity string `json:"integrity"`
			Dev       bool   `json:"dev"`
			Optional  bool   `json:"optional"`
			Link      bool   `json:"link"`
		} `json:"packages"`
	}
	if err := json.Unmarshal(content, &list); err != nil {
		return nil, fmt.Errorf("read %s: %w", lock, err)
	}
	if list.Version != 3 {
		return nil, fmt.Errorf("%s has format %d, and 3 is known", lock, list.Version)
	}
	var parts []component
	for _, path := range slices.Sorted(maps.Keys(list.Packages)) {
		p := list.Packages[path]
		if path == "" || p.Dev {
			continue
		}
		name := path[strings.LastIndex(path, "node_modules/")+len("node_modules/"):]
		if p.Link || p.Version == "" {
			return nil, fmt.Errorf("%s: %s is not a package of the registry", lock, path)
		}
		sum, err := integrity(p.Integrity)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", lock, path, err)
		}
		c := component{kind: "npm", name: name, version: p.Version, sha512: sum, users: []string{user}}
		c.purl = "pkg:npm/" + strings.Replace(name, "@", "%40", 1) + "@" + url.QueryEscape(p.Version)
		directory := filepath.Join(installed, strings.TrimPrefix(path, "node_modules/"))
		version, err := npmVersion(directory)
		if err != nil {
			return nil, fmt.Errorf("find the licence of %s: %w", name, err)
		}
		if version != p.Version {
			return nil, fmt.Errorf("%s has %s, and %s has %s: run npm ci", directory, version, lock, p.Version)
		}
		if c.texts, err = licenseFiles(directory); err != nil {
			return nil, err
		}
		parts = append(parts, c)
	}
	if len(parts) == 0 {
		return nil, fmt.Errorf("%s lists no package that is in the page", lock)
	}
	return parts, nil
}

// npmVersion is the version of an installed package.
func npmVersion(directory string) (string, error) {
	content, err := os.ReadFile(filepath.Join(directory, "package.json"))
	if err != nil {
		return "", err
	}
	var p struct {
		Version string `json:"version"`
	}
	return p.Version, json.Unmarshal(content, &p)
}

// integrity returns the SHA-512 of a package's archive, from its form in W3C's Subresource Integrity.
func integrity(text string) (string, error) {
	encoded, ok := strings.CutPrefix(text, "sha512-")
	sum, err := base64.StdEncoding.DecodeString(encoded)
	if !ok || err != nil || len(sum) != 64 {
		return "", fmt.Errorf("the integrity %q is not a SHA-512", text)
	}
	return hex.EncodeToString(sum), nil
}
