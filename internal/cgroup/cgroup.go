// Package cgroup keeps the control groups of a server's guests: one for each
// guest, below one for all of them.
//
// What lives here: finding out which hierarchies of the kernel this process may
// make groups in, ending all that is in a group, limits, and which addresses are
// closed to what is in a group. What must not: which guest may have what (agent/), when guests must end (guard/).
//
// Version 2 of the kernel's groups is used where there is one, and version 1 for
// the controllers that only it has: many hosts have both at once. Where neither
// may be written, there are no groups, and Describe says why.
package cgroup

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The controllers that are used.
const (
	cpu     = "cpu"
	memory  = "memory"
	freezer = "freezer" // version 1 only
)

// Options are what a Tree is opened with.
type Options struct {
	// Name is the server's own among all of this host's: its groups from before
	// are found by it, with what was left in them.
	Name string
	// Mounts and Self are the contents of /proc/self/mountinfo and
	// /proc/self/cgroup; empty: they are read.
	Mounts, Self string
}

// ServerName is a name for the groups of the server with this directory, which no
// other server on this host has.
func ServerName(dir string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(dir)) // never fails
	return fmt.Sprintf("argon-%016x", h.Sum64())
}

// Dirs are where a tree's groups are. Another process that has them can end what
// is in them.
type Dirs struct {
	// V2 is empty where version 2 is not used.
	V2 string `json:"v2,omitempty"`
	// V1 is by controller.
	V1 map[string]string `json:"v1,omitempty"`
}

// Tree is the group that has a group for each guest. Safe for concurrent use.
type Tree struct {
	dirs Dirs
	// homes are the groups of version 1 that this process is in.
	homes map[string]string
	// cpu and memory can be limited.
	cpu, memory bool
	reason      string
	lock        *os.File
}

// Open makes the tree, or takes up the one that an earlier process left, whose
// guests it ends: their guard is gone, and nobody would end them in time.
func Open(o Options) (*Tree, error) {
	own, err := find(o)
	if err != nil {
		return nil, err
	}
	t := &Tree{reason: "no control groups are mounted"}
	if own.v2 == "" && len(own.v1) == 0 {
		return t, nil
	}
	if err := t.make(own, o.Name); err != nil {
		return nil, err
	}
	if err := t.sweep(); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Clean ends and removes what a server of this name left that is gone for good.
func Clean(name string) error {
	own, err := find(Options{})
	if err != nil {
		return err
	}
	t := Join(Dirs{V1: map[string]string{}})
	if dir := filepath.Join(own.v2, name); own.v2 != "" && isDir(dir) {
		t.dirs.V2 = dir
	}
	for controller, parent := range own.v1 {
		if dir := filepath.Join(parent, name); isDir(dir) {
			t.dirs.V1[controller] = dir
		}
	}
	defer t.Close()
	return t.sweep()
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// find finds the groups that this process is in.
func find(o Options) (groups, error) {
	for _, f := range []struct {
		into *string
		path string
	}{{&o.Mounts, "/proc/self/mountinfo"}, {&o.Self, "/proc/self/cgroup"}} {
		if *f.into == "" {
			data, err := os.ReadFile(f.path)
			if err != nil {
				return groups{}, fmt.Errorf("finding out about control groups: %w", err)
			}
			*f.into = string(data)
		}
	}
	return ownGroups(parseMounts(o.Mounts), parseSelf(o.Self)), nil
}

// Join is the tree of another process, to end what is in it.
func Join(d Dirs) *Tree { return &Tree{dirs: d} }

// make makes the groups for all guests, where that is allowed. A second server
// of the same name, started by mistake, gets groups of its own: it must not end
// the guests of the first.
func (t *Tree) make(own groups, name string) error {
	for {
		*t = Tree{dirs: Dirs{V1: map[string]string{}}, homes: map[string]string{}}
		t.makeV2(own.v2, name)
		for _, controller := range []string{cpu, memory, freezer} {
			t.makeV1(own.v1[controller], controller, name)
		}
		dir := t.anyDir()
		if dir == "" {
			return nil
		}
		lock, err := os.Open(dir)
		if err != nil {
			return fmt.Errorf("opening the control group of all guests: %w", err)
		}
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			t.lock = lock
			return nil
		}
		_ = lock.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) || strings.Contains(name, ".") {
			return fmt.Errorf("locking the control group %s: %w", dir, err)
		}
		name = fmt.Sprintf("%s.%d", name, os.Getpid())
	}
}

// anyDir is one of the tree's directories; empty if it has none.
func (t *Tree) anyDir() string {
	return cmp.Or(t.dirs.V2, t.dirs.V1[freezer], t.dirs.V1[memory], t.dirs.V1[cpu])
}

// makeV2 makes the group of version 2, and hands on the controllers that can be.
func (t *Tree) makeV2(own, name string) {
	if own == "" {
		return
	}
	dir := filepath.Join(own, name)
	if err := mkdir(dir); err != nil {
		t.reason = err.Error()
		return
	}
	if _, err := os.Stat(filepath.Join(dir, "cgroup.kill")); err != nil {
		t.reason = "version 2 has no cgroup.kill: the kernel is older than 5.14"
		_ = os.Remove(dir)
		return
	}
	t.dirs.V2 = dir
	if !offers(own, cpu) && !offers(own, memory) {
		return
	}
	if err := vacate(own, name); err != nil {
		t.reason = err.Error()
		return
	}
	for controller, has := range map[string]*bool{cpu: &t.cpu, memory: &t.memory} {
		if !offers(own, controller) {
			continue
		}
		if err := write(own, "cgroup.subtree_control", "+"+controller); err != nil {
			t.reason = err.Error()
			continue
		}
		*has = write(dir, "cgroup.subtree_control", "+"+controller) == nil
	}
}

// vacate moves this process out of its own group into one below, if it is alone
// there: only a group without processes can hand controllers on. The kernel would
// take the one for processors all the same, and would then put no process into the
// groups below. The root is free of that.
func vacate(own, name string) error {
	if _, err := os.Stat(filepath.Join(own, "cgroup.type")); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	pids, err := processes(own)
	if err != nil {
		return err
	}
	if !slices.Equal(pids, []int{os.Getpid()}) {
		return fmt.Errorf("no limits by version 2: other processes are in the group %s", own)
	}
	leaf := filepath.Join(own, name+"-daemon")
	if err := mkdir(leaf); err != nil {
		return err
	}
	return write(leaf, "cgroup.procs", fmt.Sprint(os.Getpid()))
}

// makeV1 makes the group of one controller of version 1.
func (t *Tree) makeV1(own, controller, name string) {
	limits := map[string]*bool{cpu: &t.cpu, memory: &t.memory}[controller]
	if own == "" || limits != nil && *limits {
		return
	}
	dir := filepath.Join(own, name)
	if err := mkdir(dir); err != nil {
		t.reason = err.Error()
		return
	}
	t.dirs.V1[controller], t.homes[controller] = dir, own
	if limits != nil {
		*limits = true
	}
}

// Dirs are where the groups are.
func (t *Tree) Dirs() Dirs { return t.dirs }

// Close removes the tree, which has no groups any more.
func (t *Tree) Close() {
	if t.lock != nil {
		_ = t.lock.Close()
	}
	for _, dir := range t.all() {
		_ = os.Remove(dir)
	}
}

// Limits tells which limits can be set.
func (t *Tree) Limits() (processors, memory bool) { return t.cpu, t.memory }

// Usable tells whether there are groups at all.
func (t *Tree) Usable() bool { return t.anyDir() != "" }

// Describe says in one line what ends and limits guests.
func (t *Tree) Describe() string {
	var kill string
	switch {
	case t.dirs.V2 != "":
		kill = "control groups, version 2"
	case t.Usable():
		kill = "control groups, version 1"
	default:
		return "process groups, no limits: " + t.reason
	}
	var limits []string
	for _, l := range []struct {
		name string
		has  bool
	}{{"processors", t.cpu}, {"memory", t.memory}} {
		if l.has {
			limits = append(limits, l.name)
		}
	}
	switch {
	case len(limits) == 0 && t.reason != "":
		return kill + ", no limits: " + t.reason
	case len(limits) == 0:
		return kill + ", no limits: the controllers are not there"
	}
	return kill + ", limits of " + strings.Join(limits, " and ")
}

// all lists the tree's directories, that of version 2 first.
func (t *Tree) all() []string {
	var dirs []string
	if t.dirs.V2 != "" {
		dirs = append(dirs, t.dirs.V2)
	}
	for _, dir := range t.dirs.V1 {
		dirs = append(dirs, dir)
	}
	return dirs
}

// sweep ends and removes what an earlier process left.
func (t *Tree) sweep() error {
	var names []string
	for _, dir := range t.all() {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("looking for guests from before: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	for _, name := range names {
		g := &Group{tree: t, name: name}
		if err := g.End(); err != nil {
			return fmt.Errorf("ending a guest from before: %w", err)
		}
	}
	return nil
}

// KillAll kills all that is in any of the groups.
func (t *Tree) KillAll() error {
	if t.dirs.V2 != "" {
		return write(t.dirs.V2, "cgroup.kill", "1")
	}
	var errs error
	dir := t.anyDir()
	if dir == "" {
		return nil
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			errs = errors.Join(errs, (&Group{tree: t, name: e.Name()}).Kill())
		}
	}
	return errors.Join(err, errs)
}
