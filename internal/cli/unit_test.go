package cli

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/cluster"
	"github.com/argon-cluster/argon/internal/install"
)

// systemd starts a server again for ever, except where that can't help.
func TestUnitKnowsWhatIsFinal(t *testing.T) {
	for _, line := range []string{"StartLimitIntervalSec=0", "Restart=always", "Type=notify", "TimeoutStartSec=infinity", fmt.Sprintf("RestartPreventExitStatus=%d", exitFinal)} {
		if !strings.Contains(install.Unit, "\n"+line+"\n") {
			t.Errorf("the unit has no line %s", line)
		}
	}
	for _, tt := range []struct {
		err  error
		want int
	}{
		{cluster.ErrRemoved, exitFinal},
		{cluster.ErrSuperseded, exitFinal},
		{cluster.ErrLayout, exitFinal},
		{catalog.ErrSchema, exitFinal},
		{cluster.ErrNotRunning, exitFailed},
		{os.ErrPermission, exitFailed}, // a disk may be mounted read-only, and mended
	} {
		a := &app{err: new(strings.Builder), runs: true}
		if got := a.exit(fmt.Errorf("server: %w", errors.Join(tt.err, errors.New("and more")))); got != tt.want {
			t.Errorf("%v: exit code %d, want %d", tt.err, got, tt.want)
		}
	}
}
