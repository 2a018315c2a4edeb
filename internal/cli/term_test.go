package cli

import (
	"bytes"
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
