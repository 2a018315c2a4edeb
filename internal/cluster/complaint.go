package cluster

import (
	"context"
	"log/slog"
)

// complaint logs what keeps a loop from its work once, and not each time that
// the loop tries again. For one goroutine.
type complaint struct {
	log   *slog.Logger
	about string
	// last is what was complained of; empty while all is well.
	last string
}

// tell logs an error, unless it is the last one still, or ctx has ended; nil
// ends the trouble. It tells whether there is any.
func (c *complaint) tell(ctx context.Context, err error) bool {
	switch {
	case err == nil:
		c.last = ""
		return false
	case ctx.Err() != nil:
		return false
	case err.Error() != c.last:
		c.last = err.Error()
		c.log.Warn(c.about, "err", err)
	}
	return true
}
