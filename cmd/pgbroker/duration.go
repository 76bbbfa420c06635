package main

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// longDuration is the value of a flag for times that people count in days: 30d, 1d12h, and whatever else is a
// duration in Go.
type longDuration struct{ d *time.Duration }

func (v longDuration) String() string {
	if v.d == nil || *v.d == 0 {
		return "" // so that help shows no default
	}
	return v.d.String()
}

func (v longDuration) Type() string { return "duration" }

func (v longDuration) Set(text string) error {
	const day = 24 * time.Hour
	var days time.Duration
	if before, after, ok := strings.Cut(text, "d"); ok {
		n, err := strconv.ParseUint(before, 10, 63)
		if err != nil || n > uint64(math.MaxInt64/day) {
			return errors.New("want a number of days before the d, as in 30d or 1d12h")
		}
		if days, text = time.Duration(n)*day, after; text == "" {
			text = "0"
		}
	}
	d, err := time.ParseDuration(text)
	if err != nil || days > 0 && (d < 0 || days+d < days) {
		return errors.New("want a time such as 30d, 1d12h, 90m or 10s")
	}
	*v.d = days + d
	return nil
}
