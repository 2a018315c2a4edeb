package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// FormatVersion is the layout that this program writes. It reads version 1, too.
const FormatVersion = 2

// RegionSize is the unit in which the table notes what changed, in bytes. It
// is in the superblock so that it can differ.
const RegionSize = 1 << 20

// BlockSize is the size of one copy of the superblock: what a disk writes
// whole or not at all is at most this, and a copy that was torn is known by
// its checksum.
const BlockSize = 4096

const magic = "ARGONSB1"

// Health is whether a replica's data may be trusted.
type Health uint8

// The healths, as they are on disk.
const (
	Good Health = iota + 1
	// Syncing: a copy to it was begun and not ended.
	Syncing
	// Failed: a write or an fsync failed.
	Failed
)

// Superblock is what a replica knows of itself.
type Superblock struct {
	// Sequence grows with each write; the higher valid copy counts.
	Sequence    uint64
	ClusterID   string // at most 32 bytes, as VolumeID
	VolumeID    string
	ReplicaID   uint32
	RegionSize  uint32
	Size        uint64
	SealedEpoch uint64
	Incarnation uint64
	// Generation is when the replica was made or emptied: every region counts
	// as written then at least.
	Generation uint64
	Health     Health
	// Clean: everything was flushed, and nothing was written since.
	Clean bool
	// BootID names the kernel's boot in which the replica was last opened. At
	// most 40 bytes.
	BootID string
	// Boots counts them, from 1. At most maxBoot count.
	Boots uint32
	// Layers are oldest first, at least one; the newest is written.
	Layers []Entry
	// Base is what is read where no layer holds anything, in its first BaseSize
	// bytes.
	Base     BaseRef
	BaseSize uint64
}

// Enter notes the boot that the replica is opened in, and tells whether that is
// the one it was opened in last: then nothing was lost that the kernel had.
func (s *Superblock) Enter(bootID string) (same bool) {
	same = s.BootID == bootID
	if !same || s.Boots == 0 {
		s.BootID, s.Boots = bootID, s.Boots+1
	}
	return same
}

// Entry is a layer, and what became of it when the next was begun.
type Entry struct {
	// Number is in the names of its files.
	Number uint32
	// Snapshot is the id of the snapshot that the layer is the newest of; 0:
	// none.
	Snapshot uint32
	// Generation and Size are the volume's when the snapshot was made.
	Generation, Size uint64
	// OldTable: its table has the format of version 1.
	OldTable bool
}

// BaseRef names what a replica begins with: an image, a snapshot of another
// volume, or nothing.
type BaseRef struct {
	Image    string // at most 32 bytes, as Volume
	Volume   string
	Snapshot uint32
}

// MaxLayers is how many a superblock has room for.
const MaxLayers = 128

// Errors of Parse.
var (
	// ErrNoSuperblock: the block is damaged, or none.
	ErrNoSuperblock = errors.New("no valid superblock")
	// ErrNewerFormat: a newer argon wrote it.
	ErrNewerFormat = errors.New("written by a newer version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Offsets in a block; all numbers are little endian.
const (
	offMagic, offVersion, offRegion        = 0, 8, 12
	offSequence, offCluster, offVol        = 16, 24, 56
	offReplica, offHealth, offClean        = 88, 92, 93
	offSize, offSealed, offIncarn          = 96, 104, 112
	offGeneration, offBoot                 = 120, 128
	offLayers, offBoots                    = 168, 172
	offOldLayer                            = 176 // version 1 only
	offBaseImage, offBaseVolume            = 176, 208
	offBaseSnap, offBaseSize               = 240, 248
	offEntries, entrySize, offSum          = 256, 28, BlockSize - 4
	entNumber, entSnap, entGen             = 0, 4, 8
	entBytes, entFlags                     = 16, 24
	idLen, bootLen                         = 32, 40
	flagOldTable                    uint32 = 1
)

// Marshal makes the block.
func (s Superblock) Marshal() ([]byte, error) {
	for _, id := range []string{s.ClusterID, s.VolumeID, s.Base.Image, s.Base.Volume} {
		if len(id) > idLen {
			return nil, fmt.Errorf("superblock: an id is too long: %q", id)
		}
	}
	if len(s.BootID) > bootLen {
		return nil, fmt.Errorf("superblock: the boot's id is too long: %q", s.BootID)
	}
	if len(s.Layers) == 0 || len(s.Layers) > MaxLayers {
		return nil, fmt.Errorf("superblock: %d layers, 1 to %d can be", len(s.Layers), MaxLayers)
	}
	b := make([]byte, BlockSize)
	copy(b[offMagic:], magic)
	binary.LittleEndian.PutUint32(b[offVersion:], FormatVersion)
	binary.LittleEndian.PutUint32(b[offRegion:], s.RegionSize)
	binary.LittleEndian.PutUint64(b[offSequence:], s.Sequence)
	copy(b[offCluster:offCluster+idLen], s.ClusterID)
	copy(b[offVol:offVol+idLen], s.VolumeID)
	binary.LittleEndian.PutUint32(b[offReplica:], s.ReplicaID)
	b[offHealth] = byte(s.Health)
	if s.Clean {
		b[offClean] = 1
	}
	binary.LittleEndian.PutUint64(b[offSize:], s.Size)
	binary.LittleEndian.PutUint64(b[offSealed:], s.SealedEpoch)
	binary.LittleEndian.PutUint64(b[offIncarn:], s.Incarnation)
	binary.LittleEndian.PutUint64(b[offGeneration:], s.Generation)
	copy(b[offBoot:offBoot+bootLen], s.BootID)
	copy(b[offBaseImage:offBaseImage+idLen], s.Base.Image)
	copy(b[offBaseVolume:offBaseVolume+idLen], s.Base.Volume)
	binary.LittleEndian.PutUint32(b[offBaseSnap:], s.Base.Snapshot)
	binary.LittleEndian.PutUint64(b[offBaseSize:], s.BaseSize)
	binary.LittleEndian.PutUint32(b[offLayers:], uint32(len(s.Layers)))
	binary.LittleEndian.PutUint32(b[offBoots:], s.Boots)
	for i, e := range s.Layers {
		e.put(b[offEntries+i*entrySize:])
	}
	binary.LittleEndian.PutUint32(b[offSum:], crc32.Checksum(b[:offSum], castagnoli))
	return b, nil
}

func (e Entry) put(b []byte) {
	binary.LittleEndian.PutUint32(b[entNumber:], e.Number)
	binary.LittleEndian.PutUint32(b[entSnap:], e.Snapshot)
	binary.LittleEndian.PutUint64(b[entGen:], e.Generation)
	binary.LittleEndian.PutUint64(b[entBytes:], e.Size)
	if e.OldTable {
		binary.LittleEndian.PutUint32(b[entFlags:], flagOldTable)
	}
}

func parseEntry(b []byte) Entry {
	return Entry{
		Number:     binary.LittleEndian.Uint32(b[entNumber:]),
		Snapshot:   binary.LittleEndian.Uint32(b[entSnap:]),
		Generation: binary.LittleEndian.Uint64(b[entGen:]),
		Size:       binary.LittleEndian.Uint64(b[entBytes:]),
		OldTable:   binary.LittleEndian.Uint32(b[entFlags:])&flagOldTable != 0,
	}
}

// Parse reads a block.
func Parse(b []byte) (Superblock, error) {
	var s Superblock
	if len(b) != BlockSize || string(b[offMagic:offMagic+len(magic)]) != magic ||
		crc32.Checksum(b[:offSum], castagnoli) != binary.LittleEndian.Uint32(b[offSum:]) {
		return s, ErrNoSuperblock
	}
	version := binary.LittleEndian.Uint32(b[offVersion:])
	if version == 0 || version > FormatVersion {
		return s, fmt.Errorf("format %d, this program knows %d: install a newer argon: %w", version, FormatVersion, ErrNewerFormat)
	}
	s = Superblock{
		Sequence:    binary.LittleEndian.Uint64(b[offSequence:]),
		ClusterID:   text(b[offCluster : offCluster+idLen]),
		VolumeID:    text(b[offVol : offVol+idLen]),
		ReplicaID:   binary.LittleEndian.Uint32(b[offReplica:]),
		RegionSize:  binary.LittleEndian.Uint32(b[offRegion:]),
		Size:        binary.LittleEndian.Uint64(b[offSize:]),
		SealedEpoch: binary.LittleEndian.Uint64(b[offSealed:]),
		Incarnation: binary.LittleEndian.Uint64(b[offIncarn:]),
		Generation:  binary.LittleEndian.Uint64(b[offGeneration:]),
		Health:      Health(b[offHealth]),
		Clean:       b[offClean] == 1,
		BootID:      text(b[offBoot : offBoot+bootLen]),
		Boots:       binary.LittleEndian.Uint32(b[offBoots:]),
	}
	layers := binary.LittleEndian.Uint32(b[offLayers:])
	if s.Health < Good || s.Health > Failed || layers == 0 || layers > MaxLayers || version == 1 && layers != 1 {
		return s, ErrNoSuperblock
	}
	if version == 1 {
		s.Layers = []Entry{{Number: binary.LittleEndian.Uint32(b[offOldLayer:]), OldTable: true}}
		return s, nil
	}
	s.Base = BaseRef{
		Image:    text(b[offBaseImage : offBaseImage+idLen]),
		Volume:   text(b[offBaseVolume : offBaseVolume+idLen]),
		Snapshot: binary.LittleEndian.Uint32(b[offBaseSnap:]),
	}
	s.BaseSize = binary.LittleEndian.Uint64(b[offBaseSize:])
	for i := range int(layers) {
		s.Layers = append(s.Layers, parseEntry(b[offEntries+i*entrySize:]))
	}
	return s, s.check()
}

// check refuses layers that nobody writes.
func (s Superblock) check() error {
	numbers, snapshots := map[uint32]bool{}, map[uint32]bool{}
	for i, e := range s.Layers {
		top := i == len(s.Layers)-1
		if numbers[e.Number] || e.Snapshot != 0 && (top || snapshots[e.Snapshot]) || e.OldTable && (i > 0 || s.Base != BaseRef{}) {
			return ErrNoSuperblock
		}
		numbers[e.Number], snapshots[e.Snapshot] = true, true
	}
	return nil
}

// text is the bytes up to the first zero.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
