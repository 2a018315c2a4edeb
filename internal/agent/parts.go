package agent

import (
	"context"
	"errors"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/hypervisor"
	device "github.com/argon-cluster/argon/internal/volume"
)

// Gate says whether this server may start workloads.
type Gate interface {
	// Allowed tells whether the server holds its lease now, and the catalog
	// at this revision was read after that lease began. A server that was
	// away must not act by what it knew before: its machines may run
	// elsewhere.
	Allowed(revision int64) bool
}

// ErrOvertaken: the record has changed since the decision. Nothing is wrong;
// it is decided anew once the view shows the change.
var ErrOvertaken = errors.New("the record has changed meanwhile")

// ErrStartAfresh ends an attachment, or refuses one, when writes that the
// running guest saw acknowledged, but never flushed, may be gone. The guest
// must start again, as after a power cut.
var ErrStartAfresh = errors.New("writes that were not flushed may be lost; the guest must start again")

// Volumes attaches volumes on this server.
type Volumes interface {
	// Attach makes this server the volume's holder and serves the volume on
	// a unix socket. It returns once the epoch is taken; the attachment
	// serves when Ready is closed. ctx bounds only the taking.
	Attach(ctx context.Context, req AttachRequest) (Attachment, error)
	// Instant takes part in a group of snapshots of volumes that this server has
	// attached, whose group_size counts one more than there are volumes. It
	// calls stop once all of them are ready, before any stands still, and
	// returns when all do: then nothing written afterwards is in any of the
	// snapshots.
	Instant(ctx context.Context, group string, volumes int, stop func(context.Context) error) error
	// StandBy serves a volume on its socket without attaching it: requests wait
	// until an Attach takes it up. Its Detach ends it; nobody may wait then.
	StandBy(ctx context.Context, volumeID, machineID string, size int64) (Attachment, error)
}

// AttachRequest says what to attach, and what that was decided by.
type AttachRequest struct {
	VolumeID string
	// MachineID is empty for an attachment that is not for a machine.
	MachineID string
	// Epoch is the volume's at the decision. The compare-and-swap that takes
	// the next one must fail with ErrOvertaken if the record is in another
	// epoch: somebody was faster, and it has to be decided anew whether to
	// take it from them.
	Epoch uint64
	// GuestRuns: a guest that ran on this server's last attachment is still
	// there. Attach, or the attachment later, ends in ErrStartAfresh if its
	// disk may have gone back in time.
	GuestRuns bool
	// Standby, if there is one, is taken up: its clients become those of the
	// new attachment. Where Attach fails it stays as it is.
	Standby Attachment
}

// Attachment is a volume that this server holds. Safe for concurrent use.
type Attachment interface {
	// Disk is where it is served. The same volume has the same socket each
	// time, so that a guest finds it again after the daemon was restarted.
	Disk() hypervisor.Disk
	// Device is the volume itself, for who writes to it in this process.
	Device() device.Device
	// Ready is closed when it serves for the first time.
	Ready() <-chan struct{}
	// Done is closed when it is over: detached, deposed by a newer holder, or
	// failed.
	Done() <-chan struct{}
	// Err is why it is over; nil after Detach.
	Err() error
	// Detach ends it clean: drained, flushed, marked clean. When ctx ends
	// first it is abandoned.
	Detach(ctx context.Context) error
	// Abandon ends it at once, as a crash would.
	Abandon()
	Status() *argonv1.VolumeStatus
}

// Replicas keeps this server's copies of volumes.
type Replicas interface {
	// List names the replicas that lie here, whole: by volume, their ids.
	List(ctx context.Context) (map[string][]uint32, error)
	// Create makes one: whole or not at all. One that is here already stays
	// as it is.
	Create(ctx context.Context, req CreateReplica) (Made, error)
	// Remove deletes one. That there is none is no error.
	Remove(ctx context.Context, volumeID string, replicaID uint32) error
	// Leave notes one that is to be deleted when its disk can be used again; it
	// touches that disk no more. Leftovers are those that were noted, by volume, and
	// RemoveLeftover deletes one.
	Leave(volumeID string, replicaID uint32) error
	Leftovers() (map[string][]uint32, error)
	RemoveLeftover(volumeID string, replicaID uint32) error
	// Inside looks into a replica. An error: it is not here.
	Inside(volumeID string, replicaID uint32) (Inside, error)
	// Forget deletes a snapshot; Tidy gives its space back. That there is none
	// is no error.
	Forget(volumeID string, replicaID, snapshotID uint32) error
	// Tidy and DetachBase do a bounded part of their work; more: call again.
	Tidy(ctx context.Context, volumeID string, replicaID uint32) (more bool, err error)
	DetachBase(ctx context.Context, volumeID string, replicaID uint32) (more bool, err error)
}

// Inside is what a replica holds.
type Inside struct {
	// Based: it reads from a base.
	Based bool
	// Snapshots are the ids of those that it has.
	Snapshots []uint32
	// Untidy: there is something to give back of snapshots that are gone.
	Untidy bool
}

// Space measures what lies on this server's disk.
type Space interface {
	// Measure lists replicas in the same order each time.
	Measure() (*argonv1.Usage, error)
	// Disk is where replicas lie, and whether that can be used now. It waits for
	// nothing.
	Disk() *argonv1.Disk
}

// CreateReplica describes a new replica.
type CreateReplica struct {
	VolumeID  string
	ReplicaID uint32
	SizeBytes uint64
	// Base is what it begins with, an image or a snapshot that lies here; nil:
	// zeros.
	Base *argonv1.Base
	// Behind: it has nothing in common with the others, and is to be copied to.
	Behind bool
}

// Made is a replica as it begins.
type Made struct {
	Incarnation uint64
	// EqualBefore is the generation before which it equals all others; 0: it has
	// nothing in common with them.
	EqualBefore uint64
}

// Images keeps this server's copies of images.
type Images interface {
	// List names the images that lie here whole, without those that are
	// being imported and have no record yet.
	List(ctx context.Context) ([]string, error)
	// Has tells whether an image lies here whole, even if it is being
	// imported.
	Has(ctx context.Context, imageID string) (bool, error)
	// Fetch copies an image from one of the servers: whole and with the right
	// checksum, or not at all. It tells often how many bytes have come, and then
	// how many of them were checked.
	Fetch(ctx context.Context, image *argonv1.Image, from []*argonv1.Server, progress func(copied, checked int64)) error
	// Remove deletes one. That there is none is no error.
	Remove(ctx context.Context, imageID string) error
}

// Ports leads published ports to guests.
type Ports interface {
	// Open says which of this server's own ports a guest's published ports
	// are forwarded from, and leads connections there from now on. Asked
	// again for the same guest, also after a restart of the daemon, it says
	// the same.
	Open(ctx context.Context, m *argonv1.Machine, guestID string) ([]hypervisor.Port, error)
	// Close ends that.
	Close(guestID string)
}

// Dirs keeps the directories of guests.
type Dirs interface {
	// Make returns a guest's own directory, private and empty when new.
	Make(guestID string) (string, error)
	// Remove deletes it, if it is there. What the console printed last is kept, for
	// the machine.
	Remove(guestID, machineID string)
	// Kept lists the machines of which that is kept, and Forget deletes it.
	Kept() []string
	Forget(machineID string)
}

// Seeds makes what guests find at their first boot.
type Seeds interface {
	// Write makes the machine's in the guest's directory, and returns its path.
	Write(dir string, m *argonv1.Machine) (path string, err error)
}

// The times that an agent keeps.
const (
	// defaultTick bounds how long something waits that only time brings
	// about; guests are asked how they do this often, too.
	defaultTick = time.Second
	// defaultStopTimeout is how long a guest has to power itself down.
	defaultStopTimeout = 60 * time.Second
	// longRun is how long a guest has to run for its earlier failures to be
	// forgotten.
	longRun = time.Minute
	// firstPause and longestPause bound the growing pauses between attempts.
	firstPause   = time.Second
	longestPause = time.Minute
	// overtakenPause gives the view the time to show what it did not yet.
	overtakenPause = 50 * time.Millisecond
	// recordTimeout bounds how long the catalog may take to hear of what has
	// happened, before it is tried again.
	recordTimeout = 5 * time.Second
	// eventTimeout bounds how long an event may hold up its job.
	eventTimeout = 2 * time.Second
	// patience is how long a guest's disk may not serve before its machine
	// counts as paused: a replica that goes away is noticed within that time.
	patience = 2 * time.Second
	// detachTimeout is how long a volume may take to be flushed everywhere
	// before it is given up unclean.
	detachTimeout = 30 * time.Second
	// shutdownTimeout is the same when the daemon ends.
	shutdownTimeout = 5 * time.Second
	// yieldTime is how long a server leaves a volume alone that it made way
	// with: time enough for the user's server to attach it.
	yieldTime = 10 * time.Second
	// shortestRest and longestRest bound the pause after each step of a long
	// work on the disk.
	shortestRest = time.Millisecond
	longestRest  = time.Second
	// resumeEvery is how often a guest that stands still because of a full
	// disk is tried again.
	resumeEvery = 10 * time.Second
	// answerWithin is how long a guest's monitor may take to answer before the
	// step is tried again, or another one. In ticks.
	answerWithin = 15
	// askEvery and askAgain are how often a guest's agent is asked about the
	// guest: before it has answered, and then. In ticks.
	askEvery = 3
	askAgain = 15
)
