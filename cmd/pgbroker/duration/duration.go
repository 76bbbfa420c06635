// Package duration reads and writes spans of time, everywhere in the same way: flags, variables and files.
package duration

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

const day = 24 * time.Hour

// ErrFormat is the error of a text that is no duration.
var ErrFormat = errors.New("want a duration with its unit, such as 500ms, 8s, 1m30s, 12h, 30d or 1d12h")

// Parse reads a duration of Go, before which there may be a number of days: 1d12h. The error is ErrFormat.
func Parse(text string) (time.Duration, error) {
	var days time.Duration
	if before, after, ok := strings.Cut(text, "d"); ok {
		n, err := strconv.ParseUint(before, 10, 63)
		if err != nil || n > uint64(math.MaxInt64/day) {
			return 0, ErrFormat
		}
		if days, text = time.Duration(n)*day, after; text == "" {
			return days, nil
		}
		if text[0] == '+' || text[0] == '-' {
			return 0, ErrFormat
		}
	}
	d, err := time.ParseDuration(text)
	if err != nil || days > 0 && days+d < days {
		return 0, ErrFormat
	}
	return days + d, nil
}

// Format writes a duration as a person would: 168h, not 168h0m0s.
func Format(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// Var defines a flag that holds a duration. What is given for it has to pass check, if that is not nil.
func Var(flags *pflag.FlagSet, value *time.Duration, name string, def time.Duration, check func(time.Duration) error, usage string) {
	*value = def
	flags.Var(&flag{value, check}, name, usage)
}

type flag struct {
	value *time.Duration
	check func(time.Duration) error
}

// String implements pflag.Value. Help shows no default of 0.
func (f *flag) String() string {
	if f.value == nil || *f.value == 0 {
		return ""
	}
	return Format(*f.value)
}

// Set implements pflag.Value.
func (f *flag) Set(text string) error {
	d, err := Parse(text)
	if err == nil && f.check != nil {
		err = f.check(d)
	}
	if err == nil {
		*f.value = d
	}
	return err
}

// Type implements pflag.Value.
func (f *flag) Type() string { return "duration" }
