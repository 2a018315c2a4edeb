package mirror

import (
	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/volume"
)

// Verb is what a message asks of a replica.
type Verb uint8

// The messages of the replica protocol, as the core sees them.
const (
	// VerbRead reads; of a snapshot's content where Snapshot is not 0.
	VerbRead Verb = iota + 1
	// VerbReadVerified reads whole regions, and fails if one differs from its
	// recorded checksum; of a snapshot's content where Snapshot is not 0.
	VerbReadVerified
	VerbWrite
	VerbZero
	VerbTrim
	// VerbRevert makes the range what it is in Snapshot.
	VerbRevert
	VerbFlush
	// VerbChanged asks which grains of a range were written since a generation;
	// since 0: which may hold anything but zeros. Of a snapshot's content where
	// Snapshot is not 0.
	VerbChanged
	// VerbSums asks for the checksum of each grain of a range; of a snapshot's
	// content where Snapshot is not 0.
	VerbSums
	// VerbMend makes a range of Snapshot's content what it once was.
	VerbMend
	// VerbPrepare makes what VerbSnapshot needs, so that it takes no time.
	VerbPrepare
	// VerbSnapshot makes what the replica has now Snapshot's content.
	VerbSnapshot
	// VerbResize lets the replica grow to Len.
	VerbResize
	// VerbBeginSync marks the replica as not to be trusted, and lets it grow to
	// Len. What can differ was written in generation Base or later; a replica
	// that cannot tell, and one without a base, is emptied.
	VerbBeginSync
	// VerbEndSync flushes it and marks it good.
	VerbEndSync
)

// Reads tells whether the answer fills Data.
func (v Verb) Reads() bool {
	return v == VerbRead || v == VerbReadVerified || v == VerbChanged || v == VerbSums
}

// changes tells whether the message changes what the volume holds.
func (v Verb) changes() bool {
	return v == VerbWrite || v == VerbZero || v == VerbTrim || v == VerbRevert
}

// Effect is one thing the shell has to do. Exactly one group is set.
type Effect struct {
	// Send: ask replica Peer, in its session Session, for Verb. The answer
	// comes back through Core.Reply with the same ID.
	Send     bool
	Peer     uint32
	Session  uint64
	ID       uint64
	Verb     Verb
	Snapshot uint32
	Off      int64
	Len      int64
	Data     []byte
	FUA      bool
	// Generation of a change or a snapshot, or for VerbChanged since which.
	Generation, Base uint64

	// Dial: keep trying to reach Peer and report PeerUp. Hangup: end the
	// session with Peer, report PeerDown, dial again. Drop: end it and do not
	// dial again; Clean: tell the replica that this is a clean close.
	Dial, Hangup, Drop, Clean bool

	// Complete: answer the request.
	Complete *volume.Request
	Err      error

	// Propose: change the record, then call Committed or Deposed.
	Propose *Proposal

	// Meet: call Met once all volumes of a group have come there, or when they
	// will not.
	Meet *Rendezvous

	// Grown: the volume's size is Len now.
	Grown bool

	// Note: something an operator should know.
	Note *Note
}

// Rendezvous is where volumes wait for each other that are snapshotted together.
type Rendezvous struct {
	Snapshot uint32
	Name     string
	Size     int // how many volumes come
}

// Note is told to the operator as an event.
type Note struct {
	Severity argonv1.Severity
	Reason   string
	Message  string
}
