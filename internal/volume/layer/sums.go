package layer

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path"

	"github.com/argon-cluster/argon/internal/volume/wire"
)

const sumsName = "sums"

// A record of a region's checksum, in the file of sums. One that is torn or
// lost is none, so the file is never synced.
const (
	sumSize                          = 32
	offSumStamp, offSumOf, offSumLen = 0, 8, 24
	offSumCheck                      = 28
)

// sumRecord is what a region's content was when it had a stamp.
type sumRecord struct {
	stamp  uint64
	sum    [16]byte
	length uint32 // of the content: the last region may grow
}

func (s sumRecord) marshal(region int) []byte {
	b := make([]byte, sumSize)
	binary.LittleEndian.PutUint64(b[offSumStamp:], s.stamp)
	copy(b[offSumOf:], s.sum[:])
	binary.LittleEndian.PutUint32(b[offSumLen:], s.length)
	binary.LittleEndian.PutUint32(b[offSumCheck:], checkOfSum(b, region))
	return b
}

// parseSum reads a record; ok is false if it is none of the region.
func parseSum(b []byte, region int) (s sumRecord, ok bool) {
	if len(b) != sumSize || binary.LittleEndian.Uint32(b[offSumCheck:]) != checkOfSum(b, region) {
		return s, false
	}
	s.stamp = binary.LittleEndian.Uint64(b[offSumStamp:])
	copy(s.sum[:], b[offSumOf:])
	s.length = binary.LittleEndian.Uint32(b[offSumLen:])
	return s, s.length > 0
}

func checkOfSum(b []byte, region int) uint32 {
	place := binary.LittleEndian.AppendUint64([]byte(sumsName), uint64(region))
	return crc32.Update(crc32.Checksum(place, castagnoli), castagnoli, b[:offSumCheck])
}

// Sum says of a region what its content's checksum is, and whether that is what
// was recorded. If nothing that counts was, and the region was not written in
// the generation or later, it is recorded.
func (f *Files) Sum(region int, generation uint64) (wire.Sum, error) {
	is, err := f.sumNow(region)
	if err != nil {
		return wire.Sum{}, err
	}
	return f.judgeSum(region, is, generation)
}

func (f *Files) judgeSum(region int, is sumRecord, generation uint64) (wire.Sum, error) {
	file, err := f.sumsFile()
	if err != nil {
		return wire.Sum{}, err
	}
	out := wire.Sum{State: wire.SumNew, Sum: is.sum}
	b := make([]byte, sumSize)
	// A file that is too short has no record.
	n, _ := file.ReadAt(b, int64(region)*sumSize)
	was, ok := parseSum(b[:n], region)
	switch {
	case ok && was == is:
		out.State = wire.SumSame
	case ok && was.stamp == is.stamp && was.length == is.length:
		out.State = wire.SumDiffers
	case is.stamp < generation && is.stamp != Unknown:
		if _, err := file.WriteAt(is.marshal(region), int64(region)*sumSize); err != nil && !IsFull(err) {
			return wire.Sum{}, fmt.Errorf("replica %s: record a checksum: %w", f.dir, err)
		}
	}
	return out, nil
}

// sumNow is what would be recorded of a region. Of holes nothing is read.
func (f *Files) sumNow(region int) (sumRecord, error) {
	g := f.geometry()
	off := int64(region) * g.region
	n := min(g.region, g.size-off)
	hole := true
	err := f.Extents(off, n, func(_ int64, h bool) bool {
		hole = h
		return hole
	})
	if err != nil {
		return sumRecord{}, err
	}
	if hole {
		return f.record(region, n, f.zeroSum(n)), nil
	}
	p := make([]byte, n)
	if err := f.ReadAt(p, off); err != nil {
		return sumRecord{}, err
	}
	return f.record(region, n, sha256.Sum256(p)), nil
}

func (f *Files) record(region int, n int64, sum [sha256.Size]byte) sumRecord {
	s := sumRecord{stamp: max(f.chain.Load().stamps[region].Load(), f.sb.Load().Generation), length: uint32(n)}
	copy(s.sum[:], sum[:])
	return s
}

// zeroSum is the checksum of zeros.
func (f *Files) zeroSum(n int64) [sha256.Size]byte {
	f.summing.Lock()
	defer f.summing.Unlock()
	if f.zeros != n {
		f.zeros, f.zerosSum = n, sha256.Sum256(make([]byte, n))
	}
	return f.zerosSum
}

// Verify tells whether a region's content may be what was written: it does not
// contradict a record that counts.
func (f *Files) Verify(region int, p []byte) (bool, error) {
	s, err := f.judgeSum(region, f.record(region, int64(len(p)), sha256.Sum256(p)), 0)
	return s.State != wire.SumDiffers, err
}

// sumsFile opens the file of sums; it is made when it is first needed.
func (f *Files) sumsFile() (File, error) {
	f.summing.Lock()
	defer f.summing.Unlock()
	if f.sums != nil {
		return f.sums, nil
	}
	file, err := f.fs.Open(path.Join(f.dir, sumsName), true)
	if err != nil {
		return nil, fmt.Errorf("replica %s: %w", f.dir, err)
	}
	size := int64(f.geometry().regions()) * sumSize
	if is, err := file.Size(); err != nil || is < size {
		if err = errors.Join(err, file.Truncate(size)); err != nil {
			return nil, errors.Join(fmt.Errorf("replica %s: %w", f.dir, err), file.Close())
		}
	}
	f.sums = file
	return file, nil
}

// closeSums closes the file of sums; what needs it next opens it anew.
func (f *Files) closeSums() error {
	f.summing.Lock()
	defer f.summing.Unlock()
	file := f.sums
	f.sums = nil
	if file == nil {
		return nil
	}
	return file.Close()
}
