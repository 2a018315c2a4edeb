package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// FormatVersion is the layout that this program writes and understands.
const FormatVersion = 1

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
	// Generation is when the layer was begun: every region counts as written
	// then at least.
	Generation uint64
	Health     Health
	// Clean: everything was flushed, and nothing was written since.
	Clean bool
	// BootID names the kernel's boot in which the replica was last opened. At
	// most 40 bytes.
	BootID string
	// Layer is the number of the data file.
	Layer uint64
}

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
	offMagic, offVersion, offRegion = 0, 8, 12
	offSequence, offCluster, offVol = 16, 24, 56
	offReplica, offHealth, offClean = 88, 92, 93
	offSize, offSealed, offIncarn   = 96, 104, 112
	offGeneration, offBoot          = 120, 128
	offLayers, offLayer, offSum     = 168, 176, BlockSize - 4
	idLen, bootLen                  = 32, 40
)

// Marshal makes the block.
func (s Superblock) Marshal() ([]byte, error) {
	if len(s.ClusterID) > idLen || len(s.VolumeID) > idLen || len(s.BootID) > bootLen {
		return nil, fmt.Errorf("superblock: an id is too long: %q, %q, %q", s.ClusterID, s.VolumeID, s.BootID)
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
	binary.LittleEndian.PutUint64(b[offLayers:], 1)
	binary.LittleEndian.PutUint64(b[offLayer:], s.Layer)
	binary.LittleEndian.PutUint32(b[offSum:], crc32.Checksum(b[:offSum], castagnoli))
	return b, nil
}

// Parse reads a block.
func Parse(b []byte) (Superblock, error) {
	var s Superblock
	if len(b) != BlockSize || string(b[offMagic:offMagic+len(magic)]) != magic ||
		crc32.Checksum(b[:offSum], castagnoli) != binary.LittleEndian.Uint32(b[offSum:]) {
		return s, ErrNoSuperblock
	}
	if v := binary.LittleEndian.Uint32(b[offVersion:]); v != FormatVersion {
		return s, fmt.Errorf("format %d, this program knows %d: install a newer argon: %w", v, FormatVersion, ErrNewerFormat)
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
		Layer:       binary.LittleEndian.Uint64(b[offLayer:]),
	}
	if s.Health < Good || s.Health > Failed || binary.LittleEndian.Uint64(b[offLayers:]) != 1 {
		return s, ErrNoSuperblock
	}
	return s, nil
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
