// Package mirror attaches a replicated volume: it is the holder's half of the
// protocol whose other half is replica/. It is primary-backup replication with
// an outside configuration master (PacificA, Lin et al., MSR-TR-2008-25): the
// catalog says who the holder is (epoch) and which replicas hold every
// acknowledged write (in-sync set); the holder sends every write to all of
// them.
//
// The protocol's decisions are in Core, a state machine without I/O,
// goroutines or clocks: events go in, effects come out. Attachment is the thin
// shell that runs a Core over real connections and the real catalog; sim/ runs
// the same Core, and the same replica code, in a simulated world.
//
// What lives here: attaching, reading, writing, flushing, leaving and entering
// the in-sync set, copying to replicas that are behind, detaching. What must
// not: files (layer/), one replica's own rules (replica/), frames (wire/), the
// decision where replicas should be (controller, placement).
//
// The rules I1 to I9 are those of docs/volumes.md; comments name a rule where
// a line exists because of it.
package mirror
