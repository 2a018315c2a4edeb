package layer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/layer/simfs"
)

// The model's volume: blocks of two sectors, the last one and the last region
// cut short.
const (
	modelRegion = 16 * 1024
	modelSize   = 5*modelRegion + 3*volume.SectorSize
	modelGrain  = 8 * 1024
)

// content is what sectors hold, and what else they may hold after a power cut.
type content struct {
	now   []uint64
	maybe []map[uint64]bool
	// stamps are what each region was stamped with, at least; sure are those that
	// a power cut leaves, whatever it leaves of the content.
	stamps, sure []uint64
	born         map[uint64]uint64 // the generations that values were written in
}

func newContent(sectors int) content {
	c := content{now: make([]uint64, sectors), maybe: make([]map[uint64]bool, sectors), born: map[uint64]uint64{}}
	c.stamps = make([]uint64, regionsFor(sectors))
	c.sure = slices.Clone(c.stamps)
	for i := range c.maybe {
		c.maybe[i] = map[uint64]bool{0: true}
	}
	return c
}

func regionsFor(sectors int) int { return (sectors*volume.SectorSize + modelRegion - 1) / modelRegion }

func regionOf(sector int) int { return sector * volume.SectorSize / modelRegion }

// grow adds zeros.
func (c *content) grow(sectors int) {
	more := newContent(sectors)
	c.now, c.maybe = append(c.now, more.now...), append(c.maybe, more.maybe...)
	for len(c.stamps) < regionsFor(len(c.now)) {
		c.stamps, c.sure = append(c.stamps, 0), append(c.sure, 0)
	}
}

func (c content) clone() content {
	d := content{now: slices.Clone(c.now), stamps: slices.Clone(c.stamps), sure: slices.Clone(c.sure), born: c.born}
	for _, m := range c.maybe {
		d.maybe = append(d.maybe, maps.Clone(m))
	}
	return d
}

// put notes a write; flush that everything is durable.
func (c content) put(sector int, value uint64) {
	c.now[sector] = value
	c.maybe[sector][value] = true
}

func (c content) flush() {
	for i, v := range c.now {
		c.maybe[i] = map[uint64]bool{v: true}
	}
	copy(c.sure, c.stamps)
}

func (c content) bytes() []byte {
	b := make([]byte, 0, len(c.now)*volume.SectorSize)
	for _, v := range c.now {
		b = append(b, sectorOf(v)...)
	}
	return b
}

func sectorOf(v uint64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, v), volume.SectorSize/8)
}

// adopt takes over what was read, if it may be; afterwards that is certain. What
// is there of a write has its stamp; what is not there needs none.
func (c content) adopt(read []byte) error {
	copy(c.stamps, c.sure)
	for i := range c.now {
		s := read[i*volume.SectorSize : (i+1)*volume.SectorSize]
		v := binary.LittleEndian.Uint64(s)
		if !bytes.Equal(s, sectorOf(v)) || !c.maybe[i][v] {
			return fmt.Errorf("sector %d holds %x..%x, may hold %v", i, s[:8], s[504:], c.maybe[i])
		}
		c.now[i] = v
		c.stamps[regionOf(i)] = max(c.stamps[regionOf(i)], c.born[v])
	}
	c.flush()
	return nil
}

// snapshot is one that the model knows of.
type snapshot struct {
	content
	generation uint64
}

// model is a plain volume beside the real files.
type model struct {
	fs    *simfs.FS
	files *layer.Files
	hooks layer.Hooks
	// oneBoot: no power cut is taken for one.
	oneBoot    bool
	open       func() layer.FS
	volume     content
	snapshots  map[uint32]*snapshot
	views      map[uint32]*layer.View // that stay open
	generation uint64
	nextID     uint32
	nextValue  uint64
}

func newModel(fs *simfs.FS, baseSize int, hooks layer.Hooks) (*model, error) {
	m := &model{fs: fs, hooks: hooks, volume: newContent(modelSize / volume.SectorSize), snapshots: map[uint32]*snapshot{}, generation: 2}
	m.open = func() layer.FS { return fs }
	sb := someBlock()
	sb.RegionSize, sb.Size = modelRegion, modelSize
	if baseSize > 0 {
		sb.Base, sb.BaseSize = layer.BaseRef{Image: "image"}, modelSize
		if err := m.makeBase(baseSize); err != nil {
			return nil, err
		}
	}
	if err := layer.Create(fs, "/v/1", sb); err != nil {
		return nil, err
	}
	return m, m.reopen()
}

// makeBase makes an image with holes.
func (m *model) makeBase(size int) error {
	file, err := m.fs.Open("/image", true)
	if err != nil {
		return err
	}
	if err := file.Truncate(int64(size)); err != nil {
		return err
	}
	for i := range size / volume.SectorSize {
		if i/16%2 == 0 {
			m.nextValue++
			if _, err := file.WriteAt(sectorOf(m.nextValue), int64(i)*volume.SectorSize); err != nil {
				return err
			}
			if i < len(m.volume.now) {
				m.volume.put(i, m.nextValue)
			}
		}
	}
	m.volume.flush()
	return errors.Join(file.Sync(), m.fs.SyncDir("/"))
}

func (m *model) reopen() (err error) {
	m.views = map[uint32]*layer.View{}
	boot := fmt.Sprintf("boot-%d", m.fs.Crashes)
	if m.oneBoot {
		boot = "boot"
	}
	m.files, err = layer.Open(m.open(), "/v/1", boot, func(layer.BaseRef) (layer.Base, error) { return layer.OpenImage(m.open(), "/image") })
	if err != nil {
		return err
	}
	m.files.Break(m.hooks)
	return m.files.Update(func(sb *layer.Superblock) { sb.Enter(boot) })
}

func (m *model) sectors() int { return len(m.volume.now) }

// change writes, or zeros, and notes what it came to.
func (m *model) change(first, n int, zero bool) error {
	values := make([]uint64, n)
	var p []byte
	for i := range values {
		if !zero {
			m.nextValue++
			values[i] = m.nextValue
			m.volume.born[m.nextValue] = m.generation
		}
		p = append(p, sectorOf(values[i])...)
	}
	off := int64(first) * volume.SectorSize
	var err error
	switch {
	case zero:
		err = m.files.Zero(off, int64(len(p)), m.generation)
	case values[0]%2 == 0:
		err = m.files.WriteThin(p, off, m.generation)
	default:
		err = m.files.Write(p, off, m.generation)
	}
	for i, v := range values {
		m.volume.maybe[first+i][v] = true
		if err == nil {
			m.volume.now[first+i] = v
		}
	}
	if err != nil {
		return err
	}
	m.stamp(first, n)
	return nil
}

func (m *model) stamp(first, n int) {
	for r := first * volume.SectorSize / modelRegion; r*modelRegion < (first+n)*volume.SectorSize; r++ {
		m.volume.stamps[r] = m.generation
	}
}

// afterFull finds out what a change that found no room has done.
func (m *model) afterFull(err error) error {
	if !layer.IsFull(err) {
		return err
	}
	read := make([]byte, m.sectors()*volume.SectorSize)
	if err := m.files.ReadAt(read, 0); err != nil {
		return err
	}
	may := m.volume.clone()
	if err := may.adopt(read); err != nil {
		return fmt.Errorf("after a change that found no room: %w", err)
	}
	copy(m.volume.now, may.now)
	return nil
}

func (m *model) flush() error {
	if err := m.files.SyncData(); err != nil {
		return err
	}
	m.volume.flush()
	for _, s := range m.snapshots {
		s.flush()
	}
	return nil
}

func (m *model) snapshot() error {
	m.nextID++
	m.generation++
	err := m.files.Snapshot(m.nextID, m.generation)
	if err == nil {
		m.snapshots[m.nextID] = &snapshot{m.volume.clone(), m.generation}
	}
	return err
}

func (m *model) forget(id uint32) error {
	delete(m.snapshots, id)
	return m.files.Forget(id)
}

// revert puts a range back, for each sector with the value of before.
func (m *model) revert(id uint32, first, n int) error {
	v, err := m.files.View(id)
	if err != nil {
		return err
	}
	s := m.snapshots[id]
	err = m.files.Revert(v, int64(first)*volume.SectorSize, int64(n)*volume.SectorSize, m.generation)
	for i := first; i < first+n; i++ {
		var value uint64
		if i < len(s.now) {
			value = s.now[i]
			for may := range s.maybe[i] { // what was not flushed may be lost on both
				m.volume.maybe[i][may] = true
			}
		}
		m.volume.maybe[i][value] = true
		if err == nil {
			m.volume.now[i] = value
		}
	}
	return err
}

func (m *model) resize(more int) error {
	size := int64(m.sectors()+more) * volume.SectorSize
	if err := m.files.Resize(size); err != nil {
		return err
	}
	m.volume.grow(more)
	return nil
}

// tidy and detach do one step.
func (m *model) tidy() error {
	drained, err := m.files.MoveDown()
	if err == nil && drained {
		err = m.files.DropLayer()
	}
	return err
}

func (m *model) detach() error {
	whole, err := m.files.CopyDown()
	if err == nil && whole {
		err = m.files.DropBase()
	}
	return err
}

// powerCut loses what was not synced; what is left must be something that may be.
func (m *model) powerCut() error {
	m.fs.Crash()
	if err := m.reopen(); err != nil {
		return err
	}
	read := make([]byte, m.sectors()*volume.SectorSize)
	if err := m.files.ReadAt(read, 0); err != nil {
		return err
	}
	if err := m.volume.adopt(read); err != nil {
		return fmt.Errorf("after a power cut: %w", err)
	}
	for id, s := range m.snapshots {
		read, err := m.readSnapshot(id)
		if err == nil {
			err = s.adopt(read[:len(s.now)*volume.SectorSize])
		}
		if err != nil {
			return fmt.Errorf("snapshot %d after a power cut: %w", id, err)
		}
	}
	return nil
}

func (m *model) readSnapshot(id uint32) ([]byte, error) {
	if m.views[id] == nil {
		v, err := m.files.View(id)
		if err != nil {
			return nil, err
		}
		m.views[id] = v
	}
	v := m.views[id]
	read := make([]byte, m.sectors()*volume.SectorSize)
	return read, v.ReadAt(read, 0)
}

// check compares everything that can be read.
func (m *model) check() error {
	read := make([]byte, m.sectors()*volume.SectorSize)
	if err := m.files.ReadAt(read, 0); err != nil {
		return err
	}
	if want := m.volume.bytes(); !bytes.Equal(read, want) {
		return fmt.Errorf("the volume differs: %s", firstDifference(read, want))
	}
	bits := make([]byte, 1+len(read)/modelGrain/8)
	if err := m.files.HasData(0, int64(len(read)), modelGrain, bits); err != nil {
		return err
	}
	if err := coversData(bits, read); err != nil {
		return err
	}
	if err := m.checkChanged(m.volume.stamps, m.files.Changed); err != nil {
		return err
	}
	var ids []uint32
	for _, e := range m.files.Snapshots() {
		ids = append(ids, e.Snapshot)
	}
	slices.Sort(ids)
	if want := slices.Sorted(maps.Keys(m.snapshots)); !slices.Equal(ids, want) {
		return fmt.Errorf("snapshots %v, want %v", ids, want)
	}
	for id, s := range m.snapshots {
		if err := m.checkSnapshot(id, s); err != nil {
			return fmt.Errorf("snapshot %d: %w", id, err)
		}
	}
	return nil
}

func (m *model) checkSnapshot(id uint32, s *snapshot) error {
	read, err := m.readSnapshot(id)
	if err != nil {
		return err
	}
	want := append(s.bytes(), make([]byte, len(read)-len(s.now)*volume.SectorSize)...)
	if !bytes.Equal(read, want) {
		return errors.New(firstDifference(read, want))
	}
	v, err := m.files.View(id)
	if err != nil {
		return err
	}
	bits := make([]byte, 1+len(read)/modelGrain/8)
	if err := v.HasData(0, int64(len(read)), modelGrain, bits); err != nil {
		return err
	}
	if err := coversData(bits, read); err != nil {
		return err
	}
	var verr error
	err = m.checkChanged(s.stamps, func(since uint64, off, n, grain int64, bits []byte) {
		verr = errors.Join(verr, v.Changed(since, off, n, grain, bits))
	})
	return errors.Join(err, verr)
}

func (m *model) checkChanged(stamps []uint64, changed func(since uint64, off, n, grain int64, bits []byte)) error {
	for since := range m.generation + 1 {
		bits := make([]byte, len(stamps)/8+1)
		changed(since, 0, int64(len(stamps))*modelRegion, modelRegion, bits)
		for r, stamp := range stamps {
			if max(stamp, 1) >= since && bits[r/8]&(1<<(r%8)) == 0 {
				return fmt.Errorf("region %d was written in generation %d, and counts as unchanged since %d", r, stamp, since)
			}
		}
	}
	return nil
}

func coversData(bits, content []byte) error {
	for g := 0; g*modelGrain < len(content); g++ {
		part := content[g*modelGrain : min((g+1)*modelGrain, len(content))]
		if bits[g/8]&(1<<(g%8)) == 0 && slices.ContainsFunc(part, func(b byte) bool { return b != 0 }) {
			return fmt.Errorf("grain %d has data and counts as zeros", g)
		}
	}
	return nil
}

func firstDifference(got, want []byte) string {
	for i := range got {
		if i < len(want) && got[i] != want[i] {
			return fmt.Sprintf("sector %d (byte %d): %x, want %x", i/volume.SectorSize, i, got[i&^7:i&^7+8], want[i&^7:i&^7+8])
		}
	}
	return "the length"
}

// step does one random thing.
func (m *model) step(t *rapid.T) error {
	first := rapid.IntRange(0, m.sectors()-1).Draw(t, "first")
	n := min(rapid.SampledFrom([]int{1, 2, 3, 8, 50}).Draw(t, "n"), m.sectors()-first)
	id := uint32(0)
	if ids := slices.Sorted(maps.Keys(m.snapshots)); len(ids) > 0 {
		id = rapid.SampledFrom(ids).Draw(t, "id")
	}
	do := rapid.SampledFrom([]string{"write", "write", "write", "zero", "flush", "snapshot", "prepare", "forget", "forget", "tidy", "tidy up", "detach", "revert", "resize", "roll", "roll", "reopen", "power cut", "full", "reflinks"}).Draw(t, "do")
	switch {
	case do == "write" || do == "zero":
		return m.afterFull(m.change(first, n, do == "zero"))
	case do == "flush":
		return m.flush()
	case do == "prepare" && !m.fs.Full:
		return m.files.Prepare()
	case do == "snapshot" && !m.fs.Full:
		return m.snapshot()
	case do == "forget" && id != 0:
		return m.forget(id)
	case do == "revert" && id != 0:
		return m.afterFull(m.revert(id, first, n))
	case do == "resize" && m.sectors() < 3*modelSize/volume.SectorSize:
		return m.resize(n)
	case do == "tidy" && !m.fs.Full:
		return m.tidy()
	case do == "tidy up" && !m.fs.Full:
		for m.files.Untidy() {
			if err := m.tidy(); err != nil {
				return err
			}
		}
		return errors.Join(m.files.Close(), m.reopen())
	case do == "detach" && !m.fs.Full:
		return m.detach()
	case do == "roll":
		m.generation++
	case do == "reopen":
		if err := m.files.Close(); err != nil {
			return err
		}
		return m.reopen()
	case do == "power cut":
		return m.powerCut()
	case do == "full":
		m.fs.Full = !m.fs.Full
	case do == "reflinks":
		m.fs.Reflinks = !m.fs.Reflinks
	}
	return nil
}

// TestModel does random things to a replica's files and to a plain volume with
// plain copies for snapshots; nobody must be able to tell them apart.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if err := runModel(t, layer.Hooks{}, false); err != nil {
			t.Fatal(err)
		}
	})
}

func runModel(t *rapid.T, hooks layer.Hooks, oneBoot bool) error {
	fs := simfs.New(rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1)))
	base := rapid.SampledFrom([]int{0, 2 * modelRegion, modelSize, modelSize + modelRegion}).Draw(t, "base")
	m, err := newModel(fs, base, hooks)
	m.oneBoot = oneBoot
	for range rapid.IntRange(1, 60).Draw(t, "steps") {
		if err == nil {
			err = m.step(t)
		}
		if err == nil {
			err = m.check()
		}
	}
	return err
}

// Each rule that is broken must show.
func TestModelFindsBrokenRules(t *testing.T) {
	for _, tt := range []struct {
		rule    string
		hooks   layer.Hooks
		oneBoot bool
	}{
		{rule: "what is copied is durable before it counts", hooks: layer.Hooks{HoldBeforeData: true}},
		{rule: "a flush makes durable what is provisional", hooks: layer.Hooks{ForgetSettle: true}},
		{rule: "a stamp is durable before blocks are written in place", hooks: layer.Hooks{StampLater: true}},
		{rule: "what is provisional ends with its boot", oneBoot: true},
		{rule: "the rest of a block is copied", hooks: layer.Hooks{ForgetCopyUp: true}},
		{rule: "what moves down is durable there before it goes", hooks: layer.Hooks{MoveUnsynced: true}},
		{rule: "a flush covers what is from before a snapshot", hooks: layer.Hooks{ForgetFrozen: true}},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			run := rapid.Custom(func(t *rapid.T) error { return runModel(t, tt.hooks, tt.oneBoot) })
			for seed := range 500 {
				if err := run.Example(seed); err != nil {
					t.Logf("found by run %d: %v", seed, err)
					return
				}
			}
			t.Error("nothing was found")
		})
	}
}
