// Package counter reads what the guest that counts tells over HTTP (see
// test/guest): the demo and the tests judge by it whether anything was lost.
//
// What lives here: the form of its answer, and asking for one. What must not:
// what follows from several answers.
package counter

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Report is one answer.
type Report struct {
	// Count is the highest number whose fsync has returned; Found is the one
	// that was on the disk when the guest booted.
	Count, Found uint64
	// Boot names the guest's boot: another one each time it starts.
	Boot string
	// Time is the guest's own clock when it wrote Count, to the second.
	Time time.Time
	// Stall is the longest time that this boot took for one count, by the
	// guest's own clock; 0 if the guest does not tell.
	Stall time.Duration
}

// Parse reads lines of "word value"; it must find the first four.
func Parse(body []byte) (Report, error) {
	values := make(map[string]string)
	for line := range strings.Lines(string(body)) {
		if word, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			values[word] = value
		}
	}
	count, errCount := strconv.ParseUint(values["count"], 10, 64)
	found, errFound := strconv.ParseUint(values["found"], 10, 64)
	seconds, errTime := strconv.ParseInt(values["time"], 10, 64)
	if errCount != nil || errFound != nil || errTime != nil || values["boot"] == "" {
		return Report{}, fmt.Errorf("the guest's answer is not understood: %q", body)
	}
	stall, errStall := strconv.ParseUint(cmp.Or(values["stall"], "0"), 10, 31)
	if errStall != nil {
		return Report{}, fmt.Errorf("the guest's answer is not understood: %q", body)
	}
	return Report{
		Count: count, Found: found, Boot: values["boot"], Time: time.Unix(seconds, 0), Stall: time.Duration(stall) * time.Millisecond,
	}, nil
}

// maxReport bounds an answer, in bytes.
const maxReport = 4096

// Ask asks the guest.
func Ask(ctx context.Context, c *http.Client, url string) (Report, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return Report{}, err
	}
	res, err := c.Do(req)
	if err != nil {
		return Report{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxReport))
	if err != nil {
		return Report{}, err
	}
	return Parse(body)
}
