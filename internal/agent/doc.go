// Package agent is a server's own loop: it makes what runs and lies here equal
// to what the catalog says.
//
// What lives here: the decisions what to do next with each machine, volume,
// replica and image on this server, the order of the steps, and the report of
// what was observed. What must not: the decision where something runs or lies
// (controller, placement), QEMU, the volume protocol, files (they come in
// through the interfaces in parts.go).
//
// The loop is level-triggered. At each change of the catalog, each end of a
// step, and each tick, pure functions compare the records with what is here
// and name at most one next step for each object; each step runs in a
// goroutine of its own, so that a slow machine stalls nobody else. A step may
// be killed at any line: the next pass finds what is true and goes on from
// there. When the records change their mind while a step waits, it is
// cancelled.
//
// A guest is named after its machine and the placement it was started for
// (GuestID). So a daemon that was restarted sees from the names alone which
// guests may go on and which must end.
package agent
