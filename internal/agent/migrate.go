package agent

import (
	"fmt"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
)

// This file decides what to do next with a machine that goes to another server
// while it runs: functions without effects. docs/decisions/0022 has the table of
// what can fail at each step.

const (
	preparing = argonv1.MigrationPhase_MIGRATION_PHASE_PREPARING
	copying   = argonv1.MigrationPhase_MIGRATION_PHASE_COPYING
)

// receives tells whether a machine is on its way to this server.
func receives(m *argonv1.Machine, serverID string) bool {
	return m.GetMigration().GetToServerId() == serverID && serverID != ""
}

// expected tells whether a guest here is the one that a machine on its way is to
// become. It may be here, and must not run.
func expected(m *argonv1.Machine, serverID string, g guestSeen) bool {
	return receives(m, serverID) && m.GetMigration().GetPlacement() == g.placement
}

// goesOn tells whether a guest that stands still because of a migration, or has
// let go of its disks for one, is to run. It is the machine's own by the record,
// so no other is, or will be while this server holds its lease: one that has
// arrived because its coming was recorded; one that was sent because the order to
// send it is gone, and with it what could still have made the other one the
// machine's own. A later order is none to send it by.
func goesOn(m *argonv1.Machine, g guestSeen) bool {
	switch mig := m.GetMigration(); {
	case g.arriving:
		return true
	case mig != nil && (g.sentBy == "" || g.sentBy == mig.GetId()):
		return false
	}
	return g.handsOver || g.status.State == hypervisor.Leaving || g.status.State == hypervisor.Left
}

// justArrived tells whether it is still to be written down that a machine that
// came here goes on.
func justArrived(m *argonv1.Machine, serverID string, g guestSeen) bool {
	last := m.GetLastMigration()
	return belongs(m, serverID) && last.GetToServerId() == serverID && last.GetFailure() == "" && last.GetResumed() == nil &&
		g.adopted && !g.exited && !inTransit(g) && g.status.State != hypervisor.ShutDown
}

// beingSent tells whether a guest stands still for a moment because of what is
// done to send it.
func beingSent(m *argonv1.Machine, g guestSeen) bool {
	return m.GetMigration() != nil && g.sentBy == m.GetMigration().GetId() &&
		g.status.State == hypervisor.Paused && g.status.Detail == "paused"
}

// inTransit tells whether nothing can be said of a guest: it stands still for a
// moment, or is not the machine's own yet.
func inTransit(g guestSeen) bool {
	switch g.status.State {
	case hypervisor.Receiving, hypervisor.Leaving, hypervisor.Left:
		return true
	}
	return g.arriving
}

// migrationStep is what the server that a machine runs on does next about its
// migration.
type migrationStep uint8

const (
	stay migrationStep = iota
	// send sends the guest, and makes the other one the machine's own.
	send
	// giveUp takes the order off the record.
	giveUp
)

func (s migrationStep) String() string { return [...]string{"stay", "send", "give up"}[s] }

// migrationSeen is what is known of a migration on the server that sends.
type migrationSeen struct {
	// guest is the machine's own; nil if it has none here.
	guest *guestSeen
	// sending: it is being sent by this run of the daemon.
	sending bool
	// unattached: not all of its disks are attached here yet; it came a moment
	// ago.
	unattached bool
	// target is the name of the server that it goes to.
	target      string
	targetAlive bool
	// lasts is for how long this run of the daemon has known of it.
	lasts time.Duration
}

// nextForMigration names the next step of the server that the machine runs on,
// and why it gives up.
func nextForMigration(m *argonv1.Machine, serverID string, seen migrationSeen, allowed bool) (step migrationStep, why string) {
	mig := m.GetMigration()
	if mig == nil || !belongs(m, serverID) || !allowed {
		return stay, ""
	}
	// How long it may last is said by one server and kept by another, whose clock
	// may show another time: what counts is this server's stopwatch.
	limit := mig.GetDeadline().AsTime().Sub(mig.GetSince().AsTime())
	g := seen.guest
	switch {
	case mig.GetCancel():
		return giveUp, "it was cancelled"
	case wanted(m) != argonv1.Wanted_WANTED_RUNNING:
		return giveUp, "the machine is to stop"
	case !seen.targetAlive:
		return giveUp, fmt.Sprintf("server %s was lost", seen.target)
	case seen.lasts >= limit:
		return giveUp, fmt.Sprintf("it was not done after %v", limit.Round(time.Second))
	case g == nil || g.exited || g.status.State == hypervisor.ShutDown:
		return giveUp, "the guest has ended"
	case seen.sending:
		return send, ""
	case !g.adopted || goesOn(m, *g) || mig.GetPhase() == preparing:
		return stay, ""
	case mig.GetPhase() == copying && !inTransit(*g) && seen.unattached:
		return stay, ""
	case mig.GetPhase() == copying && !inTransit(*g):
		return send, ""
	}
	return giveUp, "the server that sent it was interrupted"
}
