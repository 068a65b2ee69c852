package logql

import (
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"
)

// parseNumber reads a number of a query: decimal, with an exponent, or hexadecimal.
func parseNumber(s string) (float64, bool) {
	if strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") {
		n, err := strconv.ParseUint(s[2:], 16, 64)
		return float64(n), err == nil
	}
	if s == "" || strings.ContainsAny(s, "xXpPiInN_") { // hexadecimal floats, infinities and underscores are Go's, not LogQL's
		return 0, false
	}
	n, err := strconv.ParseFloat(s, 64)
	return n, err == nil
}

// parseQueryDuration reads a duration of a query in Prometheus' form (1d, 2w) or Go's (1.5h, 20µs).
func parseQueryDuration(s string) (time.Duration, bool) {
	if d, err := time.ParseDuration(s); err == nil {
		return d, true
	}
	d, err := model.ParseDuration(s)
	return time.Duration(d), err == nil
}

// queryByteUnits are the units that a query may use; values of labels may use more.
var queryByteUnits = [...]string{"B", "kB", "MB", "GB", "TB", "PB", "KB", "KiB", "MiB", "GiB", "TiB", "PiB"}

// parseQueryBytes reads a count of bytes of a query.
func parseQueryBytes(s string) (float64, bool) {
	unit := strings.TrimLeft(s, "0123456789.")
	for _, u := range queryByteUnits {
		if u == unit {
			return parseBytes(s)
		}
	}
	return 0, false
}

// parseBytes reads a count of bytes as people write it: 5 MiB, 1.5k, 2,000. Units of 1000 have no i.
func parseBytes(s string) (float64, bool) {
	end := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' && r != ',' })
	if end < 0 {
		end = len(s)
	}
	n, err := strconv.ParseFloat(strings.ReplaceAll(s[:end], ",", ""), 64)
	if err != nil {
		return 0, false
	}
	unit := strings.ToLower(strings.TrimSpace(s[end:]))
	unit = strings.TrimSuffix(unit, "b")
	base := 1000.0
	if strings.HasSuffix(unit, "i") {
		unit, base = strings.TrimSuffix(unit, "i"), 1024
		if unit == "" {
			return 0, false
		}
	}
	power := strings.Index("kmgtpe", unit)
	switch {
	case unit == "":
		power = 0
	case len(unit) != 1 || power < 0:
		return 0, false
	default:
		power++
	}
	n *= math.Pow(base, float64(power))
	if n >= math.MaxUint64 {
		return 0, false
	}
	return math.Floor(n), true
}

// addresses is what ip("…") matches: one address, a range, or a network.
type addresses struct{ from, to netip.Addr }

// parseAddresses reads the pattern of ip("…").
func parseAddresses(pattern string) (addresses, bool) {
	if prefix, err := netip.ParsePrefix(pattern); err == nil {
		return addresses{prefix.Masked().Addr(), lastOf(prefix)}, true
	}
	if from, to, ok := strings.Cut(pattern, "-"); ok {
		a, errA := netip.ParseAddr(strings.TrimSpace(from))
		b, errB := netip.ParseAddr(strings.TrimSpace(to))
		return addresses{a, b}, errA == nil && errB == nil && a.Is4() == b.Is4() && !b.Less(a)
	}
	a, err := netip.ParseAddr(pattern)
	return addresses{a, a}, err == nil && a.Zone() == ""
}

// lastOf returns the last address of a network.
func lastOf(prefix netip.Prefix) netip.Addr {
	raw := prefix.Masked().Addr().AsSlice()
	for bit := prefix.Bits(); bit < len(raw)*8; bit++ {
		raw[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(raw)
	return last
}

func (a addresses) contain(ip netip.Addr) bool {
	return ip.Is4() == a.from.Is4() && !ip.Less(a.from) && !a.to.Less(ip)
}

// in says whether one of the addresses stands in a text, between characters that no address has.
func (a addresses) in(text string) bool {
	v4 := a.from.Is4()
	part := func(c byte) bool {
		return isDigit(c) || c == '.' || !v4 && (c == ':' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F')
	}
	for i := 0; i < len(text); {
		if !part(text[i]) {
			i++
			continue
		}
		end := i
		for end < len(text) && part(text[end]) {
			end++
		}
		word := text[i:end]
		i = end
		const longest = 45 // of IPv6 with IPv4 in it
		if len(word) > longest+1 {
			continue
		}
		ip, err := netip.ParseAddr(word)
		if err != nil { // a sentence may end with an address
			ip, err = netip.ParseAddr(strings.TrimRight(word, ".:"))
		}
		if err == nil && a.contain(ip) {
			return true
		}
	}
	return false
}
