package loki

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"polymesh.dev/polymesh/observe/logql"
)

// request is the parameters of a request, from its address or its form.
type request struct {
	*http.Request
	form url.Values
	now  time.Time
	ctx  context.Context
}

func newRequest(r *http.Request) *request {
	return &request{Request: r, form: r.Form, now: time.Now(), ctx: r.Context()}
}

// invalidError means that a request is invalid.
type invalidError struct{ text string }

func (e *invalidError) Error() string { return e.text }

func invalid(format string, args ...any) error { return &invalidError{fmt.Sprintf(format, args...)} }

// span reads start, end and since. An hour is Loki's default for lines and numbers, six for labels.
func (r *request) span(length time.Duration) (start, end time.Time, err error) {
	end = r.now
	if s := r.form.Get("end"); s != "" {
		if end, err = parseTime(s); err != nil {
			return start, end, invalid("could not parse 'end' parameter: %s", err)
		}
	}
	from := end
	if from.After(r.now) { // what is before the future begins is meant
		from = r.now
	}
	if s := r.form.Get("since"); s != "" {
		if length, err = parseDuration(s); err != nil {
			return start, end, invalid("could not parse 'since' parameter: %s", err)
		}
	}
	start = from.Add(-length)
	if s := r.form.Get("start"); s != "" {
		if start, err = parseTime(s); err != nil {
			return start, end, invalid("could not parse 'start' parameter: %s", err)
		}
	}
	if end.Before(start) {
		return start, end, invalid("end timestamp must not be before or equal to start time")
	}
	return start, end, nil
}

// The range of times that the store can have.
var (
	earliest = time.Unix(0, 0)
	latest   = time.Unix(math.MaxInt64/int64(time.Second)-1, 0)
)

// parseTime reads nanoseconds, seconds with a fraction, or RFC 3339.
func parseTime(s string) (time.Time, error) {
	var t time.Time
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if len(strings.TrimPrefix(s, "-")) <= 10 { // seconds, as Loki has it
			t = time.Unix(n, 0)
		} else {
			t = time.Unix(0, n)
		}
	} else if f, err := strconv.ParseFloat(s, 64); err == nil && math.Abs(f) < math.MaxInt64/float64(time.Second) {
		whole, fraction := math.Modf(f)
		t = time.Unix(int64(whole), int64(math.Round(fraction*1000))*int64(time.Millisecond))
	} else if t, err = time.Parse(time.RFC3339Nano, s); err != nil {
		return t, fmt.Errorf("%.40q is not a time", s)
	}
	if t.Before(earliest) {
		return earliest, nil
	}
	if t.After(latest) {
		return latest, nil
	}
	return t, nil
}

// parseDuration reads seconds, or a duration as Prometheus or Go write it.
func parseDuration(s string) (time.Duration, error) {
	if f, err := strconv.ParseFloat(s, 64); err == nil {
		if math.Abs(f) >= math.MaxInt64/float64(time.Second) || math.IsNaN(f) {
			return 0, fmt.Errorf("%.40q is too long", s)
		}
		return time.Duration(f * float64(time.Second)), nil
	}
	if d, err := model.ParseDuration(s); err == nil {
		return time.Duration(d), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%.40q is not a duration", s)
	}
	return d, nil
}

// defaultLimit is the default number of lines.
const defaultLimit = 100

func (r *request) limit() (int, error) {
	s := r.form.Get("limit")
	if s == "" {
		return defaultLimit, nil
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, invalid("could not parse 'limit' parameter: %.40q is not a number of lines", s)
	}
	return int(n), nil
}

func (r *request) direction() (logql.Direction, error) {
	switch s := r.form.Get("direction"); strings.ToLower(s) {
	case "", "backward":
		return logql.Backward, nil
	case "forward":
		return logql.Forward, nil
	default:
		return false, invalid("invalid direction %.40q: it is forward or backward", s)
	}
}

// step reads the time between two values: by default there are about 250.
func (r *request) step(start, end time.Time) (time.Duration, error) {
	s := r.form.Get("step")
	if s == "" {
		return max(time.Second, end.Sub(start)/250).Truncate(time.Second), nil
	}
	d, err := parseDuration(s)
	if err != nil {
		return 0, invalid("could not parse 'step' parameter: %s", err)
	}
	if d <= 0 {
		return 0, invalid("zero or negative query resolution step widths are not accepted. Try a positive integer")
	}
	return max(d, time.Millisecond), nil
}

func (r *request) interval() (time.Duration, error) {
	s := r.form.Get("interval")
	if s == "" {
		return 0, nil
	}
	d, err := parseDuration(s)
	if err != nil || d < 0 {
		return 0, invalid("could not parse 'interval' parameter: %.40q is not a duration", s)
	}
	return d, nil
}
