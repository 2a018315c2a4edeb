package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Group is one guest's. Safe for concurrent use.
type Group struct {
	tree *Tree
	name string
	v2   *os.File // for who starts processes in it
}

// Limits are what a guest may have at most. 0: no limit, and the usual weight.
type Limits struct {
	// CPUPercent is in hundredths of one processor.
	CPUPercent uint32 `json:"cpu_percent,omitempty"`
	// CPUWeight is 1 to 10000, usually 100.
	CPUWeight   uint32 `json:"cpu_weight,omitempty"`
	MemoryBytes uint64 `json:"memory_bytes,omitempty"`
}

// Make makes a group, empty.
func (t *Tree) Make(name string) (*Group, error) {
	g := &Group{tree: t, name: name}
	for _, dir := range g.dirs() {
		if err := mkdir(dir); err != nil {
			return nil, err
		}
	}
	if t.dirs.V2 != "" {
		var err error
		if g.v2, err = os.Open(filepath.Join(t.dirs.V2, name)); err != nil {
			return nil, fmt.Errorf("opening a control group: %w", err)
		}
	}
	return g, nil
}

func (g *Group) dirs() []string {
	dirs := g.tree.all()
	for i := range dirs {
		dirs[i] = filepath.Join(dirs[i], g.name)
	}
	return dirs
}

// Start has a process started in the group: start gets attr to do so, and must
// fork from the thread that it is called on, which must be locked. The process
// is in the group from its first instruction on.
func (g *Group) Start(attr *syscall.SysProcAttr, start func() error) error {
	if g.v2 != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(g.v2.Fd())
	}
	// Version 1 knows no such thing: the thread goes there itself, and its child
	// with it.
	tid := strconv.Itoa(unix.Gettid())
	for controller, dir := range g.tree.dirs.V1 {
		if err := write(filepath.Join(dir, g.name), "tasks", tid); err != nil {
			return err
		}
		defer func() { _ = write(g.tree.homes[controller], "tasks", tid) }()
	}
	return start()
}

// Set sets the limits; those that the host does not know are left out.
func (g *Group) Set(l Limits) error {
	var errs error
	for _, f := range limitFiles(l, g.tree.dirs, g.tree.cpu, g.tree.memory) {
		errs = errors.Join(errs, write(filepath.Join(f.dir, g.name), f.name, f.value))
	}
	return errs
}

// SetProcessors sets the limits of processors only.
func (g *Group) SetProcessors(l Limits) error {
	var errs error
	for _, f := range processorFiles(l, g.tree.dirs, g.tree.cpu) {
		errs = errors.Join(errs, write(filepath.Join(f.dir, g.name), f.name, f.value))
	}
	return errs
}

// limitFile is one file to be written.
type limitFile struct{ dir, name, value string }

// cpuPeriod is what a cap on processors is counted in, in microseconds.
const cpuPeriod = 100_000

// limitFiles says what to write, for each version. What has a controller of
// version 1 has none of version 2.
func limitFiles(l Limits, d Dirs, hasCPU, hasMemory bool) []limitFile {
	return append(processorFiles(l, d, hasCPU), memoryFiles(l, d, hasMemory)...)
}

func processorFiles(l Limits, d Dirs, has bool) []limitFile {
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	weight := int64(l.CPUWeight)
	if weight == 0 {
		weight = 100
	}
	quota := int64(l.CPUPercent) * cpuPeriod / 100
	var files []limitFile
	switch v1 := d.V1[cpu]; {
	case v1 != "":
		if quota == 0 {
			quota = -1
		}
		files = append(
			files, limitFile{v1, "cpu.cfs_period_us", number(cpuPeriod)}, limitFile{v1, "cpu.cfs_quota_us", number(quota)},
			limitFile{v1, "cpu.shares", number(max(2, weight*1024/100))},
		)
	case has:
		most := "max"
		if quota > 0 {
			most = number(quota)
		}
		files = append(
			files, limitFile{d.V2, "cpu.max", most + " " + number(cpuPeriod)}, limitFile{d.V2, "cpu.weight", number(weight)},
		)
	}
	return files
}

func memoryFiles(l Limits, d Dirs, has bool) []limitFile {
	var files []limitFile
	switch v1 := d.V1[memory]; {
	case v1 != "" && l.MemoryBytes == 0:
		files = append(files, limitFile{v1, "memory.limit_in_bytes", "-1"})
	case v1 != "":
		files = append(files, limitFile{v1, "memory.limit_in_bytes", strconv.FormatUint(l.MemoryBytes, 10)})
	case has && l.MemoryBytes == 0:
		files = append(files, limitFile{d.V2, "memory.max", "max"})
	case has:
		files = append(files, limitFile{d.V2, "memory.max", strconv.FormatUint(l.MemoryBytes, 10)})
	}
	return files
}

// rounds bounds how often a group of version 1 is gone through: what is frozen
// can't start anything, so once is enough unless freezing takes its time.
const rounds = 100

// Kill kills all that is in the group, also what is stopped, was forked or is
// forking.
func (g *Group) Kill() error {
	if g.tree.dirs.V2 != "" {
		return write(filepath.Join(g.tree.dirs.V2, g.name), "cgroup.kill", "1")
	}
	dir := g.tree.anyDir()
	if dir == "" {
		return nil
	}
	dir = filepath.Join(dir, g.name)
	var err error
	for range rounds {
		if g.tree.dirs.V1[freezer] != "" {
			// A task that can't be frozen now is one that can't fork either.
			_ = write(dir, "freezer.state", "FROZEN")
		}
		var pids []int
		if pids, err = processes(dir); err != nil {
			err = notGone(err)
		}
		for _, pid := range pids {
			err = errors.Join(err, ignoreESRCH(unix.Kill(pid, unix.SIGKILL)))
		}
		if g.tree.dirs.V1[freezer] != "" {
			err = errors.Join(err, notGone(write(dir, "freezer.state", "THAWED")))
		}
		if len(pids) == 0 || err != nil {
			return err
		}
	}
	return nil // all have their signal; some take their time
}

func ignoreESRCH(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func notGone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

const (
	// endTimeout bounds how long something killed may take to go: what waits in
	// the kernel for a disk, say, goes when that answers.
	endTimeout = 10 * time.Second
	lookEvery  = time.Millisecond
)

// End kills what is in the group, waits until nothing of it runs any more, and
// removes the group.
func (g *Group) End() error {
	if g.v2 != nil {
		defer g.v2.Close()
	}
	for began := time.Now(); ; {
		// What nobody has waited for yet may keep the directory, which is taken
		// up again by the next group of this name.
		if g.remove() || g.empty() {
			return nil
		}
		if time.Since(began) > endTimeout {
			return fmt.Errorf("something in the control group %s can't be ended within %v", g.name, endTimeout)
		}
		if err := notGone(g.Kill()); err != nil {
			return err
		}
		time.Sleep(lookEvery)
	}
}

// remove removes the group's directories and tells whether all are gone.
func (g *Group) remove() bool {
	all := true
	for _, dir := range g.dirs() {
		err := os.Remove(dir)
		all = all && (err == nil || errors.Is(err, os.ErrNotExist))
	}
	return all
}

// empty tells whether nothing in the group runs.
func (g *Group) empty() bool {
	for _, dir := range g.dirs() {
		pids, err := processes(dir)
		if err != nil && notGone(err) != nil {
			return false
		}
		if slices.ContainsFunc(pids, runs) {
			return false
		}
	}
	return true
}

// runs tells whether a process is more than what its parent has yet to see.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH)
	}
	after := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	return len(after) == 0 || after[0] != "Z" && after[0] != "X"
}

// processes lists what is in a group, itself only.
func processes(dir string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("listing the processes of a control group: %w", err)
	}
	var pids []int
	for field := range strings.FieldsSeq(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func mkdir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("making a control group: %w", err)
	}
	return nil
}

// write writes a file of a group in one call, which is what the kernel wants.
func write(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("setting a control group: %w", err)
	}
	return nil
}
