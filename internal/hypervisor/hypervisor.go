// Package hypervisor is the interface to a machine monitor.
//
// What lives here: what a guest is made of, what can be asked of one. What
// must not: QEMU's words (qemu/), the catalog, decisions about what should run.
package hypervisor

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"time"
)

// Acceleration is what a guest's processors run on.
type Acceleration string

// The accelerations. Auto is a wish; a probe turns it into one of the others.
const (
	Auto Acceleration = "auto"
	KVM  Acceleration = "kvm"
	TCG  Acceleration = "tcg"
)

// Spec is everything a guest is made of.
type Spec struct {
	// ID names the guest on this server: one guest per ID.
	ID           string
	Name         string
	CPUs         int
	MemoryBytes  int64
	Acceleration Acceleration // KVM or TCG
	// Machine is the monitor's name of the kind of machine; empty: the newest.
	// A guest that goes on from a memory must be of the kind that this is of.
	Machine string
	// Generation is what the guest tells a copy of itself by: a UUID that is
	// another one where it goes on from a memory once more. Empty: it has no such
	// device.
	Generation string
	Shares     Shares
	// Disks, the boot disk first.
	Disks []Disk
	// Seed is the file of a small disk for the guest's first boot, which the
	// guest may only read; empty: none.
	Seed     string
	Firmware Firmware
	// Networks are its interfaces; none given: one.
	Networks []Network
	// Ports lead to the first of them.
	Ports []Port
	// Dir is the guest's own directory; it exists, is private, and keeps the
	// monitor and console sockets and the console's log.
	Dir string
	// Incoming: it does not boot. It waits for the state of another guest, on
	// IncomingSocket(Dir), and stands still with it until Resume.
	Incoming bool
}

// IncomingSocket is where a guest waits for another one's state: a unix socket,
// for one connection.
func IncomingSocket(dir string) string { return filepath.Join(dir, "incoming.sock") }

// Disk is an NBD export on a unix socket. While it waits, the guest waits; it
// never sees an I/O error because of that.
type Disk struct {
	// Slot is its place on the guest's bus, from 0 to MaxDisks-1: a copy of the
	// guest needs it in the same. The lowest boots first.
	Slot   int
	Socket string
	Export string
	// Serial shows up inside the guest (/dev/disk/by-id). At most 20 bytes.
	Serial string
}

// Firmware is what a guest starts with.
type Firmware string

// The kinds of firmware. The zero value is BIOS.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// Network is a network interface.
type Network struct {
	// Slot is as a disk's, up to MaxNetworks-1. Published ports lead to 0.
	Slot int
	MAC  string // empty: the monitor's choice
}

// MaxDisks and MaxNetworks are what the places on a guest's bus leave.
const (
	MaxDisks    = 16
	MaxNetworks = 8
)

// Devices are the slots of what a guest has now, in order.
type Devices struct{ Disks, Networks []int }

// Port forwards a TCP port of this server to the guest.
type Port struct {
	HostAddress string // an address of this server, such as "127.0.0.1"
	HostPort    int
	GuestPort   int
}

// RunState is what a guest's processors do.
type RunState string

// The run states an agent decides by.
const (
	Running RunState = "running"
	// Paused: by an I/O error (full disk) or by request; Resume goes on.
	Paused RunState = "paused"
	// ShutDown: the guest has powered itself off.
	ShutDown RunState = "shutdown"
	// Receiving: it waits for the state of another guest, or is being given it.
	Receiving RunState = "receiving"
	// Leaving: it stands still while the last of its state is sent elsewhere.
	Leaving RunState = "leaving"
	// Halted: a signal has stopped its process, so nothing of it runs until another
	// one lets it go on.
	Halted RunState = "halted"
	// Left: all of its state is elsewhere. Only Resume makes it go on here.
	Left RunState = "left"
)

// Status is what a monitor says of its guest.
type Status struct {
	State RunState
	// Detail is the monitor's own word, such as "io-error".
	Detail string
}

// Probe is what Monitor.Probe found.
type Probe struct {
	Acceleration Acceleration
	// Reason says in one line why it is not KVM; empty when it is.
	Reason  string
	Version string // the monitor's
}

// ErrNoAgent: no guest agent listens in the guest.
var ErrNoAgent = errors.New("no guest agent answers")

// ErrOldGuest: the guest was started by a server that did not know what is
// asked for; it has it when it is started again.
var ErrOldGuest = errors.New("it was started before this was possible: start it again")

// ErrHeld: the guest was asked to let go of a device, and has not.
var ErrHeld = errors.New("the guest does not let go of it")

// Info is what a guest's agent says. It is bounded and can be printed; it need
// not be true.
type Info struct {
	Hostname, OS string
	// Addresses, without those that mean nothing outside.
	Addresses []string
}

// Monitor starts guests and finds those that run. Safe for concurrent use.
type Monitor interface {
	// Probe finds out which acceleration really runs an ordinary guest.
	Probe(ctx context.Context) (Probe, error)
	// Start starts a guest and returns once its processors run. On an error
	// nothing is left behind.
	Start(ctx context.Context, spec Spec) (Guest, error)
	// Wake makes a guest that goes on from a memory that Guest.Save wrote. It
	// returns once all of it was read, up to io.EOF: the guest stands still
	// then, and goes on with Resume. On an error nothing is left behind, and no
	// processor has run.
	Wake(ctx context.Context, spec Spec, memory io.Reader) (Guest, error)
	// Adopt takes up a guest that runs already, after a restart of the
	// daemon. os.ErrNotExist when there is none of this ID.
	Adopt(ctx context.Context, id string) (Guest, error)
	// List names the guests that run on this server now.
	List(ctx context.Context) ([]string, error)
}

// Guest is one running guest. Safe for concurrent use.
type Guest interface {
	ID() string
	PID() int
	// Status asks the monitor. It takes a second at most.
	Status(ctx context.Context) (Status, error)
	// PowerDown asks the guest's agent, if one answers, to shut it down, else
	// presses the ACPI power button. It does not wait until the guest has.
	PowerDown(ctx context.Context) error
	// PressPower presses the ACPI power button.
	PressPower(ctx context.Context) error
	// Reset presses the reset button.
	Reset(ctx context.Context) error
	// SetPorts forwards those that are wanted, and no more those of stale that are
	// not. One that is forwarded already may be given again.
	SetPorts(ctx context.Context, stale, wanted []Port) error
	// Resume goes on after Paused.
	Resume(ctx context.Context) error
	// Pause makes it stand still; nothing is under way at its disks then.
	Pause(ctx context.Context) error
	// Platform is what its memory fits on.
	Platform(ctx context.Context) (Platform, error)
	// PrepareSave gets ready for Save, which it makes short, and says whether
	// the guest could run on during it.
	PrepareSave(ctx context.Context) (SaveMode, error)
	// Save saves memory and devices of a guest that stands still, as they are
	// then. If live, which PrepareSave must have allowed, it returns as soon as
	// the guest runs again, and Saved.Memory waits for what is not there yet;
	// else once all is there, and the guest still stands still. After an error
	// it may stand still, too; Resume goes on.
	Save(ctx context.Context, live bool) (Saved, error)
	// DropSave gives back what PrepareSave took, if no Save followed. Harmless at
	// any other time.
	DropSave(ctx context.Context) error
	// SetShares changes them while it runs. ErrCannotLimit when the server has
	// nothing to do so with; what it can is set all the same.
	SetShares(ctx context.Context, s Shares) error
	// GrowDisk lets the guest see that a disk has that many bytes now. One that has
	// so many already stays as it is. ErrOldGuest when it can't.
	GrowDisk(ctx context.Context, d Disk, bytes int64) error
	// Devices says which disks and network cards it has. ErrOldGuest where those
	// can't be changed.
	Devices(ctx context.Context) (Devices, error)
	// AddDisk and AddNetwork give it one more while it runs. After an error it has
	// not got it.
	AddDisk(ctx context.Context, d Disk) error
	AddNetwork(ctx context.Context, n Network) error
	// RemoveDisk and RemoveNetwork ask the guest to let go of one, and return once it
	// has and nothing uses it any more. ErrHeld when it has not by the end of ctx: it
	// may still do so.
	RemoveDisk(ctx context.Context, slot int) error
	RemoveNetwork(ctx context.Context, slot int) error
	// Kill ends it at once and returns when it is gone.
	Kill(ctx context.Context) error
	// Send copies the guest's state to where conn leads while the guest goes
	// on. It returns nil once the guest stands still and only the rest is to
	// be sent; it owns conn and what belongs to the transfer until Finish or
	// StopSending. Whatever else ends it, ctx for one, the guest goes on.
	// progress is told now and then.
	Send(ctx context.Context, conn net.Conn, progress func(Transfer)) error
	// Finish sends the rest after Send and returns once all of it is on the
	// other side: from then on the guest stands still until Resume. After an
	// error it may have gone on.
	Finish(ctx context.Context) (Transfer, error)
	// StopSending gives up what Send began, of an earlier run of the daemon,
	// too. When it returns nothing is being sent; a guest that is not Left
	// goes on.
	StopSending(ctx context.Context) error
	// Console opens the serial console: first what was printed last (up to
	// 64 KiB), then what is printed now. Several may be open.
	Console(ctx context.Context) (io.ReadWriteCloser, error)
	// Display opens the guest's screen, keyboard and pointer, as VNC speaks of
	// them (RFC 6143), without a password. Several may be open.
	Display(ctx context.Context) (io.ReadWriteCloser, error)
	// Screenshot is what the screen shows now, as a PNG.
	Screenshot(ctx context.Context) ([]byte, error)
	// Info asks the guest's agent. ErrNoAgent if none answers.
	Info(ctx context.Context) (Info, error)
	// Freeze has the guest's agent bring its file systems to rest. Whoever
	// calls it calls Thaw afterwards, also when it failed. ErrNoAgent if none
	// answers.
	Freeze(ctx context.Context) error
	// Thaw ends that. One that is not frozen stays as it is.
	Thaw(ctx context.Context) error
	// SetClock has the guest's agent set its clock, which stood still with the
	// guest, to this host's. ErrNoAgent if none answers.
	SetClock(ctx context.Context) error
	// Done is closed when the guest's process is gone.
	Done() <-chan struct{}
}

// Transfer is how far a guest's state was sent.
type Transfer struct {
	SentBytes, RemainingBytes, TotalBytes uint64
	// Downtime is how long the guest stood still until all was on the other
	// side; before that, how long it would now.
	Downtime time.Duration
	// Passes is how often its memory was gone through.
	Passes int
	// Throttle is by how many hundredths its processors are slowed down.
	Throttle int
}

// Platform is the monitor's own name of a guest's kind of machine, and its
// version.
type Platform struct{ Machine, Version string }

// SaveMode says how a guest can be saved.
type SaveMode struct {
	Live bool
	// Reason says in one line why not; empty when it can.
	Reason string
}

// Saved is what a Save has saved.
type Saved struct {
	// Memory ends in io.EOF when all of it was read, and in another error if
	// there is no more and there should be. To be closed, at any time.
	Memory io.ReadCloser
	// Stopped is when the guest began to stand still, and Pause for how long it
	// did; 0 if it still does.
	Stopped time.Time
	Pause   time.Duration
}

// StartTimeout bounds how long a monitor may take to run a guest's first
// instruction.
const StartTimeout = 30 * time.Second
