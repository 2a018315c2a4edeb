package guard

import (
	"log/slog"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notifyName is the variable that the service manager names its socket by. Neither
// the daemon nor guests get it: what the manager hears comes from the guard, its
// main process, so that no guest can speak to it.
const notifyName = "NOTIFY_SOCKET"

// manager is the service manager that started the guard, if one did, such as
// systemd; see sd_notify(3).
type manager struct{ log *slog.Logger }

func (m manager) tell(lines ...string) {
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		m.log.Warn("the service manager was not told", "state", lines[0], "err", err)
	}
}

// status tells what the server does, or waits for. serving: it has started.
func (m manager) status(serving bool, text string) {
	lines := []string{"STATUS=" + strings.Join(strings.Fields(text), " ")}
	if serving {
		lines = append([]string{daemon.SdNotifyReady}, lines...)
	}
	m.tell(lines...)
}

// reloading tells that another daemon takes the place of the one that runs.
func (m manager) reloading() {
	m.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()), "STATUS=the daemon is replaced")
}

func (m manager) stopping() {
	m.tell(daemon.SdNotifyStopping, "STATUS=its machines move away or shut down")
}
