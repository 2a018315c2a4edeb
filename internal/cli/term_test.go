package cli

import (
	"bytes"
	"strings"
	"testing"
)

func TestProgressIsSilentWithoutTerminal(t *testing.T) {
	var errs bytes.Buffer
	a := &app{err: &errs}
	p := a.startProgress("waiting")
	p.Set("still waiting")
	p.Stop()
	(&phaseBar{app: a}).show("receiving", 1, 2)
	if errs.Len() > 0 {
		t.Errorf("printed %q", errs.String())
	}
}

func TestParseReport(t *testing.T) {
	r, err := parseReport("count 12\nfound 7\nboot 3f2a\nclock 1.5\n")
	if err != nil || r != (countReport{count: 12, found: 7, boot: "3f2a"}) {
		t.Errorf("got %+v, %v", r, err)
	}
	for _, body := range []string{"", "count 12", "count x\nfound 7\nboot a", "count 1\nfound 7\nboot ", "<html>"} {
		if r, err := parseReport(body); err == nil {
			t.Errorf("%q: %+v", body, r)
		}
	}
}

func FuzzParseReport(f *testing.F) {
	f.Add("count 12\nfound 7\nboot 3f2a\n")
	f.Fuzz(func(t *testing.T, body string) {
		if r, err := parseReport(body); err == nil && (r.boot == "" || strings.Contains(r.boot, "\n")) {
			t.Errorf("%q: %+v", body, r)
		}
	})
}
