package page

import (
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prometheus/common/model"
)

// Bounds of what a request may choose.
const (
	minWindow     = 30 * time.Second
	maxWindow     = 31 * 24 * time.Hour
	defaultWindow = 15 * time.Minute
	maxNameBytes  = 1024
	maxNames      = 100
)

// period is a time range that a request is about.
type period struct{ start, end time.Time }

func (p period) window() time.Duration { return p.end.Sub(p.start) }

// step returns a step for about n points, whole multiples of the scrape interval.
func (p period) step(n int) time.Duration {
	const scrape = 15 * time.Second
	step := (p.window() / time.Duration(n)).Truncate(scrape)
	return max(step, scrape)
}

// periodOf reads the parameters end (Unix milliseconds, now if absent) and window (a duration as in PromQL).
func (s *server) periodOf(r *http.Request) (period, error) {
	q := r.URL.Query()
	end := s.Now()
	if text := q.Get("end"); text != "" {
		ms, err := strconv.ParseInt(text, 10, 64)
		if err != nil || ms <= 0 || ms > 1<<45 {
			return period{}, invalid("end is not a time in Unix milliseconds")
		}
		end = time.UnixMilli(ms)
	}
	window := defaultWindow
	if text := q.Get("window"); text != "" {
		d, err := model.ParseDuration(text)
		if err != nil {
			return period{}, invalid("window is not a duration, such as 15m or 7d")
		}
		window = time.Duration(d)
	}
	if window < minWindow || window > maxWindow {
		return period{}, invalid("window must be between %s and 31 days", minWindow)
	}
	end = end.Truncate(time.Millisecond)
	return period{end.Add(-window), end}, nil
}

// nameOf reads a parameter that is a name chosen elsewhere. It is only ever compared, never part of a query without quotes.
func nameOf(r *http.Request, parameter string) (string, error) {
	return checkName(parameter, r.URL.Query().Get(parameter))
}

func checkName(what, name string) (string, error) {
	switch {
	case len(name) > maxNameBytes:
		return "", invalid("%s is longer than %d bytes", what, maxNameBytes)
	case !utf8.ValidString(name) || strings.ContainsRune(name, 0):
		return "", invalid("%s is not text", what)
	}
	return name, nil
}

// pathOf reads a name from the path.
func pathOf(r *http.Request, parameter string) (string, error) {
	name, err := checkName(parameter, r.PathValue(parameter))
	if err == nil && name == "" {
		err = invalid("%s is empty", parameter)
	}
	return name, err
}

// namesOf reads a parameter that can be repeated.
func namesOf(r *http.Request, parameter string) ([]string, error) {
	values := r.URL.Query()[parameter]
	if len(values) > maxNames {
		return nil, invalid("%s is repeated more than %d times", parameter, maxNames)
	}
	for _, v := range values {
		if _, err := checkName(parameter, v); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// numberOf reads a number within bounds, or the default if it is absent.
func numberOf(r *http.Request, parameter string, standard, least, most int) (int, error) {
	text := r.URL.Query().Get(parameter)
	if text == "" {
		return standard, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		return 0, invalid("%s must be a number between %d and %d", parameter, least, most)
	}
	return n, nil
}
