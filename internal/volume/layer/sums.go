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
	g := f.geometry()
	off := int64(region) * g.region
	is, err := f.sumWith(f, off, min(g.region, g.size-off))
	if err != nil {
		return wire.Sum{}, err
	}
	is.stamp = f.stampOf(f.chain.Load(), region)
	out, err := f.judgeSum(region, is)
	recorded := out.State == wire.SumSame
	if err == nil && out.State == wire.SumNew && is.stamp < generation && is.stamp != Unknown {
		recorded, err = true, f.recordSum(region, is)
	}
	if err == nil && recorded {
		err = f.handDown(region, is)
	}
	return out, err
}

// judgeSum compares what a region is with the record that counts.
func (f *Files) judgeSum(region int, is sumRecord) (wire.Sum, error) {
	out := wire.Sum{State: wire.SumNew, Sum: is.sum}
	was, ok, err := f.volumeRecord(region)
	if ok && (was.stamp == is.stamp || f.hooks.StaleSums) && was.length == is.length {
		out.State = compared(was, is)
	}
	return out, err
}

// volumeRecord is what is recorded of a region of the volume.
func (f *Files) volumeRecord(region int) (s sumRecord, ok bool, err error) {
	file, err := f.sumsFile()
	if err != nil {
		return s, false, err
	}
	s, ok = readSum(file, region)
	return s, ok, nil
}

// readSum reads a region's record; ok is false if there is none.
func readSum(file File, region int) (s sumRecord, ok bool) {
	b := make([]byte, sumSize)
	// A file that is too short has no record.
	n, _ := file.ReadAt(b, int64(region)*sumSize)
	return parseSum(b[:n], region)
}

func writeSum(file File, region int, s sumRecord) error {
	_, err := file.WriteAt(s.marshal(region), int64(region)*sumSize)
	return err
}

func (f *Files) recordSum(region int, is sumRecord) error {
	file, err := f.sumsFile()
	if err == nil {
		err = writeSum(file, region, is)
	}
	if err != nil && !IsFull(err) {
		return fmt.Errorf("replica %s: record a checksum: %w", f.dir, err)
	}
	return nil
}

// content is what checksums are of: the volume's, or a snapshot's.
type content interface {
	ReadAt(p []byte, off int64) error
	Extents(off, n int64, found func(n int64, hole bool) bool) error
}

// sumWith is what would be recorded of a range, but for the stamp. Of holes
// nothing is read.
func (f *Files) sumWith(c content, off, n int64) (sumRecord, error) {
	hole := true
	err := c.Extents(off, n, func(_ int64, h bool) bool {
		hole = h
		return hole
	})
	if err != nil {
		return sumRecord{}, err
	}
	if hole {
		return sumOf(f.zeroSum(n), n), nil
	}
	p := make([]byte, n)
	if err := c.ReadAt(p, off); err != nil {
		return sumRecord{}, err
	}
	return sumOf(sha256.Sum256(p), n), nil
}

func sumOf(sum [sha256.Size]byte, n int64) sumRecord {
	s := sumRecord{length: uint32(n)}
	copy(s.sum[:], sum[:])
	return s
}

// stampOf is the stamp that a region counts as having.
func (f *Files) stampOf(c *chain, region int) uint64 {
	return max(c.stamps[region].Load(), f.sb.Load().Generation)
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
	is := sumOf(sha256.Sum256(p), int64(len(p)))
	is.stamp = f.stampOf(f.chain.Load(), region)
	s, err := f.judgeSum(region, is)
	return s.State != wire.SumDiffers, err
}

// sumsFile opens the file of sums; it is made when it is first needed.
func (f *Files) sumsFile() (File, error) {
	f.summing.Lock()
	defer f.summing.Unlock()
	if f.sums != nil {
		return f.sums, nil
	}
	file, err := openSums(f.fs, path.Join(f.dir, sumsName), true, f.geometry().regions())
	if err != nil {
		return nil, fmt.Errorf("replica %s: %w", f.dir, err)
	}
	f.sums = file
	return file, nil
}

// openSums opens a file with records of so many regions, or makes it longer.
func openSums(fs FS, name string, create bool, regions int) (File, error) {
	file, err := fs.Open(name, create)
	if err != nil {
		return nil, err
	}
	size := int64(regions) * sumSize
	if is, err := file.Size(); err != nil || is < size {
		if err = errors.Join(err, file.Truncate(size)); err != nil {
			return nil, errors.Join(err, file.Close())
		}
	}
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
