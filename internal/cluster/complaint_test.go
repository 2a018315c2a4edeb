package cluster

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

func TestComplaint(t *testing.T) {
	var said strings.Builder
	c := complaint{log: slog.New(slog.NewTextHandler(&said, nil)), about: "it rains"}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	wet, cold := errors.New("wet"), errors.New("cold")
	for i, tt := range []struct {
		ctx     context.Context
		err     error
		trouble bool
		lines   int
	}{
		{t.Context(), wet, true, 1},
		{t.Context(), wet, true, 1},
		{t.Context(), cold, true, 2},
		{ended, wet, false, 2},
		{t.Context(), nil, false, 2},
		{t.Context(), cold, true, 3},
	} {
		if got := c.tell(tt.ctx, tt.err); got != tt.trouble || strings.Count(said.String(), "it rains") != tt.lines {
			t.Errorf("step %d: %v, said %q", i, got, said.String())
		}
	}
}
