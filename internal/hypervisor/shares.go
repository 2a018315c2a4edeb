package hypervisor

import "errors"

// Shares are what a guest may have of its server at most. 0: no limit, and the
// usual weight.
type Shares struct {
	// CPUPercent is in hundredths of one processor, for all of the guest's.
	CPUPercent uint32
	// CPUWeight is 1 to 10000, against other guests; usually 100.
	CPUWeight uint32
	// DiskIOPS and DiskBytesPerSecond are of all its disks together.
	DiskIOPS           uint64
	DiskBytesPerSecond uint64
}

// ErrCannotLimit: this server has nothing to set some of a guest's shares with.
var ErrCannotLimit = errors.New("this server can't limit processors")

// TranslationBytes bounds the memory that emulation keeps translated code in.
const TranslationBytes = 128 << 20

// Overhead is what running a guest takes besides the guest's own memory, rather
// too much than too little: it is set aside, and a guest whose monitor takes more
// is ended.
func Overhead(cpus int, memory int64, a Acceleration) int64 {
	const (
		monitor   = 96 << 20
		processor = 8 << 20
		// perMemory is for page tables and what a disk has under way.
		perMemory = 64
	)
	n := int64(monitor) + int64(cpus)*processor + memory/perMemory
	if a != KVM {
		n += TranslationBytes
	}
	return n
}
