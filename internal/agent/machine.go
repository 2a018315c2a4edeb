package agent

import (
	"slices"
	"strconv"
	"strings"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file decides what to do next with a machine: functions without effects.

// GuestID names the guest that runs a machine for one placement.
func GuestID(machineID string, placement uint64) string {
	return machineID + "-" + strconv.FormatUint(placement, 10)
}

// parseGuestID is the reverse of GuestID.
func parseGuestID(guestID string) (machineID string, placement uint64, ok bool) {
	i := strings.LastIndexByte(guestID, '-')
	if i <= 0 {
		return "", 0, false
	}
	placement, err := strconv.ParseUint(guestID[i+1:], 10, 64)
	return guestID[:i], placement, err == nil
}

// guestSeen is what is known of a guest on this server.
type guestSeen struct {
	placement uint64
	// adopted: its monitor answers to us. Nothing can be asked of it before.
	adopted bool
	// exited: its process is gone; poweredOff: by its own will.
	exited, poweredOff bool
	status             hypervisor.Status
	// haltedAt is when its process was first seen halted; zero if it is not.
	haltedAt     time.Time
	acceleration hypervisor.Acceleration
	// machineType is the monitor's name of its kind; empty if it did not say.
	machineType string
	// stopSince is when it was first seen that it is to stop; zero if it is not.
	stopSince time.Time
	// powerDownAt is when its power button was pressed; zero if not.
	powerDownAt time.Time
	// pressedAgain: its power button was pressed once more.
	pressedAgain bool
	resumedAt    time.Time
	// info is what its agent says; nil if none answers.
	info *argonv1.GuestInfo
	// shares are what it was last given; unshared: that is not known, as it was
	// found running. sharesDetail says what of them can't be.
	shares       hypervisor.Shares
	unshared     bool
	sharesDetail string
	// ports are those of the guest that are forwarded to; unforwarded: that is not
	// known, as it was found running.
	ports       []uint32
	unforwarded bool
	// clings: it was asked to let go of a device, and has not. asked: its devices are
	// to be looked after again, because of that or another failure, or as it was found
	// running. changeAfter is when its devices are
	// looked after again, after a failure; devicesDetail says of what kind.
	clings, asked bool
	changeAfter   time.Time
	devicesDetail string
	// diskSizes are those that it was told of last; nil: that is not known.
	diskSizes []uint64
	// wokenFrom is the checkpoint that this run has made it of.
	wokenFrom string
	// saving: it stands still for a checkpoint.
	saving bool
	// arriving: it came, or is to come, from another server, and was not told
	// to go on yet.
	arriving bool
	// sentBy is the migration that it was sent for last, by this run of the
	// daemon.
	sentBy string
	// handsOver: its disks are let go of, as it is about to run elsewhere.
	handsOver bool
}

// machineSeen is what is known here of a machine.
type machineSeen struct {
	guests []guestSeen
	disks  disksSeen
	// doing says what is done that takes long before there is a guest; empty if
	// nothing is.
	doing string
	// retryAt and failure are set after a failed start or a crash.
	retryAt time.Time
	failure string
}

// disksSeen sums up the attachments of a machine's volumes on this server.
type disksSeen struct {
	// ready: all of them serve.
	ready bool
	// over says why one that the guest uses is over; empty if none is.
	over string
	// waits says what keeps them from being ready, or, with a guest, what
	// keeps a request waiting; empty if nothing does.
	waits string
	// full: the wait is for room on a disk.
	full bool
	// held: at least one is attached.
	held bool
	// sizes are those that the record says, in bytes.
	sizes []uint64
	// spare: one serves that the guest is to be given.
	spare bool
}

// machineStep is what to do next with a machine.
type machineStep uint8

const (
	rest machineStep = iota
	// adopt takes up a guest that was found running.
	adopt
	start
	pressPower
	// pressAgain presses the power button of one that did not go.
	pressAgain
	kill
	resume
	// share gives a guest the shares that its record says.
	share
	// grow tells a guest of the sizes of its disks.
	grow
	// reap forgets a guest whose process is gone, and what follows from the
	// way it went.
	reap
	// check looks whether the checkpoint that a machine is to go on from is
	// whole, and has its disks made what they were.
	check
	// wake makes a guest of a checkpoint's memory.
	wake
	// receive makes a guest that waits for the state of the one on another
	// server, announceIt says that it does.
	receive
	announceIt
	// goOn makes a guest run that a migration left standing.
	goOn
	// forward gives a guest the ports that its record says.
	forward
	// change gives a guest the disks and network cards that its record says.
	change
)

func (s machineStep) String() string {
	return [...]string{"rest", "adopt", "start", "press power", "press power again", "kill", "resume", "share", "grow", "reap", "check", "wake", "receive", "announce", "go on", "forward", "change"}[s]
}

// belongs tells whether a machine is to be run by this server, as far as
// places go.
func belongs(m *argonv1.Machine, serverID string) bool {
	return m != nil && m.GetServerId() == serverID && serverID != ""
}

// wanted is what is wanted of a machine where it is: one that is to move has to
// stop here first.
func wanted(m *argonv1.Machine) argonv1.Wanted {
	if m.GetMove() != nil && m.GetMove().GetPlacement() == m.GetPlacement() && m.GetWanted() == argonv1.Wanted_WANTED_RUNNING {
		return argonv1.Wanted_WANTED_STOPPED
	}
	return m.GetWanted()
}

// nextForMachine names a machine's next step, and the placement of the guest
// it is about. m is nil when the catalog does not know the machine.
func nextForMachine(m *argonv1.Machine, serverID string, seen machineSeen, allowed bool, now time.Time) (machineStep, uint64) {
	for _, g := range seen.guests {
		if step := nextForGuest(m, serverID, g, seen.disks, allowed, now); step != rest {
			return step, g.placement
		}
	}
	if len(seen.guests) > 0 || !allowed || now.Before(seen.retryAt) || wanted(m) != argonv1.Wanted_WANTED_RUNNING {
		return rest, 0
	}
	switch {
	case receives(m, serverID) && m.GetMigration().GetPhase() == preparing && seen.disks.ready:
		return receive, m.GetMigration().GetPlacement()
	case !belongs(m, serverID):
		return rest, 0
	case m.GetWake() != nil:
		return nextForSleeper(m, seen.disks), m.GetPlacement()
	case seen.disks.ready:
		return start, m.GetPlacement()
	}
	return rest, 0
}

// nextForGuest decides about one guest. The order matters: whoever must not
// run here is killed before anything else is asked.
func nextForGuest(m *argonv1.Machine, serverID string, g guestSeen, disks disksSeen, allowed bool, now time.Time) machineStep {
	current := belongs(m, serverID) && m.GetPlacement() == g.placement
	awaited := expected(m, serverID, g) && disks.over == ""
	switch {
	case g.exited:
		return reap
	case !g.adopted:
		return adopt
	case awaited && m.GetMigration().GetPhase() == preparing && g.status.State == hypervisor.Receiving:
		return announceIt
	case awaited:
		return rest
	case !current, disks.over != "", g.status.State == hypervisor.ShutDown, superseded(m, g):
		return kill
	case g.saving || m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED && !inTransit(g):
		return rest // until its memory is saved, or can't be
	case goesOn(m, g):
		if !allowed {
			return rest
		}
		return goOn
	case inTransit(g) && !m.GetForceStop(), m.GetWanted() == argonv1.Wanted_WANTED_SUSPENDED:
		return rest // its migration is given up first, if it is to stop
	}
	if wanted(m) != argonv1.Wanted_WANTED_RUNNING {
		return nextForStop(m, g, now)
	}
	if g.isHalted(now) {
		return kill // to start it again
	}
	if leftStanding(m, g) && allowed && now.Sub(g.resumedAt) >= firstPause {
		return resume
	}
	if standsStill(g) && (!disks.full || now.Sub(g.resumedAt) >= resumeEvery) && now.Sub(g.resumedAt) >= firstPause {
		return resume
	}
	if g.unshared || g.shares != sharesOf(m) {
		return share
	}
	if g.unforwarded || !slices.Equal(g.ports, portsOf(m)) {
		return forward
	}
	if disks.ready && !slices.Equal(g.diskSizes, disks.sizes) {
		return grow
	}
	if changes(m, g, disks) && !now.Before(g.changeAfter) {
		return change
	}
	return rest
}

// haltedFor is how long a guest's process may be seen halted before another takes
// its place. It was silent for a second by then.
const haltedFor = 2 * time.Second

// isHalted reports whether a guest has been halted for too long. Nobody can tell
// from outside whether it would ever go on.
func (g *guestSeen) isHalted(now time.Time) bool {
	return !g.haltedAt.IsZero() && now.Sub(g.haltedAt) >= haltedFor
}

// sharesOf are the shares that a machine's guest should have.
func sharesOf(m *argonv1.Machine) hypervisor.Shares {
	s := m.GetShares()
	return hypervisor.Shares{
		CPUPercent: s.GetCpuPercent(), CPUWeight: s.GetCpuWeight(),
		DiskIOPS: s.GetDiskIops(), DiskBytesPerSecond: s.GetDiskBytesPerSecond(),
	}
}

// changes reports whether there is something to do about a guest's devices. What
// another one is being made after stays as it is.
func changes(m *argonv1.Machine, g guestSeen, disks disksSeen) bool {
	if m.GetMigration() != nil || g.status.State != hypervisor.Running {
		return false
	}
	c := placement.Changing(m)
	return g.asked || disks.spare || len(c.Detach)+len(c.AddCards)+len(c.RemoveCards) > 0
}

// portsOf are the ports of a machine's guest that something is published from, in
// order.
func portsOf(m *argonv1.Machine) []uint32 {
	var ports []uint32
	for _, p := range m.GetPorts() {
		ports = append(ports, p.GetGuestPort())
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// nextForStop ends a guest: by its agent or its power button, by the button once
// more, as an agent may say yes and do nothing, and by force when told to or when
// it takes too long, whatever its monitor makes of the button. One that stands
// still can't obey: it goes on first.
func nextForStop(m *argonv1.Machine, g guestSeen, now time.Time) machineStep {
	limit := stopTimeout(m)
	switch {
	case m.GetForceStop(), neverRan(g):
		return kill
	case !g.stopSince.IsZero() && now.Sub(g.stopSince) >= limit:
		return kill
	case leftStanding(m, g):
		if now.Sub(g.resumedAt) >= firstPause {
			return resume
		}
	case g.powerDownAt.IsZero():
		return pressPower
	case !g.pressedAgain && now.Sub(g.powerDownAt) >= limit/2:
		return pressAgain
	}
	return rest
}

// stopTimeout is how long a machine's guest has to shut down.
func stopTimeout(m *argonv1.Machine) time.Duration {
	if s := m.GetStopTimeoutSeconds(); s > 0 {
		return time.Duration(s) * time.Second
	}
	return defaultStopTimeout
}

// noteStop notes since when a guest is to stop. One that is to run again after all,
// and has not obeyed in the time that it had, runs on: what it does later is its own
// will.
func (g *guestSeen) noteStop(m *argonv1.Machine, now time.Time) {
	stops := toldToStop(m, *g)
	switch {
	case stops && g.stopSince.IsZero():
		g.stopSince = now
	case !stops:
		g.stopSince = time.Time{}
	}
	if wanted(m) == argonv1.Wanted_WANTED_RUNNING && !g.powerDownAt.IsZero() && now.Sub(g.powerDownAt) >= stopTimeout(m) {
		g.powerDownAt, g.pressedAgain = time.Time{}, false
	}
}

// standsStill tells whether a guest was stopped by an I/O error: its disk was
// full.
func standsStill(g guestSeen) bool {
	return g.status.State == hypervisor.Paused && g.status.Detail == "io-error"
}

// neverRan tells whether nobody has told a new guest to go on: whoever started it
// is gone.
func neverRan(g guestSeen) bool {
	return g.status.State == hypervisor.Paused && g.status.Detail == "prelaunch"
}

// toldToStop tells whether a guest that runs is to obey its power button.
func toldToStop(m *argonv1.Machine, g guestSeen) bool {
	w := wanted(m)
	return m != nil && w != argonv1.Wanted_WANTED_RUNNING && w != argonv1.Wanted_WANTED_SUSPENDED && g.adopted && !g.saving && !inTransit(g)
}

// pauseAfter is how long to wait after so many failures in a row.
func pauseAfter(failures int) time.Duration {
	pause := firstPause
	for range min(failures-1, 10) {
		pause *= 2
	}
	return min(pause, longestPause)
}
