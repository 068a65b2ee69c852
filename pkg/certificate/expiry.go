package certificate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

// Expiry is when a certificate expires.
type Expiry struct {
	Name string
	// Authority is set for an authority, which all servers share.
	Authority bool
	Expires   time.Time
}

// Expiries returns when the certificates of a store expire, the next one first. Files that are not there yet are left out.
func Expiries(s Store) ([]Expiry, error) {
	var all []Expiry
	names := authorityNames()
	for _, l := range leaves(Options{Observe: true}) {
		names = append(names, l.name)
	}
	for i, name := range names {
		text, err := os.ReadFile(s.Cert(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read certificate %s: %w", name, err)
		}
		cert, err := ParseAuthority(text)
		if err != nil {
			return nil, fmt.Errorf("read certificate %s: %w", s.Cert(name), err)
		}
		all = append(all, Expiry{Name: name, Authority: i < len(authorityNames()), Expires: cert.NotAfter})
	}
	slices.SortStableFunc(all, func(a, b Expiry) int { return a.Expires.Compare(b.Expires) })
	return all, nil
}
