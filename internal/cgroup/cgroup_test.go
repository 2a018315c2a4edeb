package cgroup

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const patience = 30 * time.Second // a hang, not a measure

const hybrid = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`

func TestOwnGroups(t *testing.T) {
	for name, c := range map[string]struct {
		mounts, self string
		want         groups
	}{
		"version 2": {
			"25 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			"0::/system.slice/argon.service\n",
			groups{v2: "/sys/fs/cgroup/system.slice/argon.service", v1: map[string]string{}},
		},
		"both": {
			hybrid, "9:name=systemd:/\n7:freezer:/a\n4:memory:/b/c\n2:cpu,cpuacct:/\n0::/d\n",
			groups{v2: "/sys/fs/cgroup/unified/d", v1: map[string]string{
				cpu: "/sys/fs/cgroup/cpu,cpuacct", memory: "/sys/fs/cgroup/memory/b/c", freezer: "/sys/fs/cgroup/freezer/a",
			}},
		},
		"a container sees a part": {
			"25 1 0:26 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "0::/docker/x/y\n",
			groups{v2: "/sys/fs/cgroup/y", v1: map[string]string{}},
		},
		"a group that can't be seen": {
			"25 1 0:26 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "0::/docker/xy\n", groups{v1: map[string]string{}},
		},
		"a blank":           {"25 1 0:26 / /a\\040b rw - cgroup2 cgroup rw\n", "0::/\n", groups{v2: "/a b", v1: map[string]string{}}},
		"none":              {"25 1 0:26 / /proc rw - proc proc rw\n", "", groups{v1: map[string]string{}}},
		"what nobody wrote": {"- - -\n\n25 1\n", "::\n0\n:::::\n", groups{v1: map[string]string{}}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := ownGroups(parseMounts(c.mounts), parseSelf(c.self)); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func FuzzFind(f *testing.F) {
	f.Add(hybrid, "2:cpu,cpuacct:/\n0::/d\n")
	f.Fuzz(func(t *testing.T, mounts, self string) {
		for _, m := range parseMounts(mounts) {
			if dir, ok := m.dir("/x"); ok && !strings.HasPrefix(dir, filepath.Clean(m.point)) {
				t.Errorf("%s is not below %s", dir, m.point)
			}
		}
		ownGroups(parseMounts(mounts), parseSelf(self))
	})
}

func TestLimitFiles(t *testing.T) {
	v2 := Dirs{V2: "/2"}
	v1 := Dirs{V2: "/2", V1: map[string]string{cpu: "/c", memory: "/m"}}
	for name, c := range map[string]struct {
		limits Limits
		dirs   Dirs
		has    bool
		want   []limitFile
	}{
		"version 2": {Limits{CPUPercent: 150, CPUWeight: 50, MemoryBytes: 1 << 20}, v2, true, []limitFile{
			{"/2", "cpu.max", "150000 100000"}, {"/2", "cpu.weight", "50"}, {"/2", "memory.max", "1048576"},
		}},
		"version 2, none": {Limits{}, v2, true, []limitFile{
			{"/2", "cpu.max", "max 100000"}, {"/2", "cpu.weight", "100"}, {"/2", "memory.max", "max"},
		}},
		"version 1": {Limits{CPUPercent: 25, CPUWeight: 200, MemoryBytes: 1 << 20}, v1, true, []limitFile{
			{"/c", "cpu.cfs_period_us", "100000"},
			{"/c", "cpu.cfs_quota_us", "25000"},
			{"/c", "cpu.shares", "2048"},
			{"/m", "memory.limit_in_bytes", "1048576"},
		}},
		"version 1, none": {Limits{}, v1, true, []limitFile{
			{"/c", "cpu.cfs_period_us", "100000"},
			{"/c", "cpu.cfs_quota_us", "-1"},
			{"/c", "cpu.shares", "1024"},
			{"/m", "memory.limit_in_bytes", "-1"},
		}},
		"no controllers": {Limits{CPUPercent: 25}, v2, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := limitFiles(c.limits, c.dirs, c.has, c.has); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// open makes a tree of this test's own, without some kinds of mounts.
func open(t *testing.T, without string) *Tree {
	t.Helper()
	tree, err := Open(Options{Name: treeName(t), Mounts: mountsWithout(t, without)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tree.Close)
	if !tree.Usable() {
		t.Skip("no control groups to test with: ", tree.Describe())
	}
	return tree
}

func mountsWithout(t *testing.T, kind string) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var kept strings.Builder
	for line := range strings.Lines(string(mounts)) {
		if kind == "" || !strings.Contains(line, " - "+kind+" ") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

func treeName(t *testing.T) string {
	return fmt.Sprintf("argon-test-%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), os.Getpid())
}

// each runs a test with what there is, and with either version alone.
func each(t *testing.T, test func(t *testing.T, without string)) {
	t.Run("as it is", func(t *testing.T) { test(t, "") })
	t.Run("version 1 only", func(t *testing.T) { test(t, "cgroup2") })
	t.Run("version 2 only", func(t *testing.T) { test(t, "cgroup") })
}

// start runs a shell in a group; it prints a line when it is ready.
func start(t *testing.T, g *Group, script string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	runtime.LockOSThread()
	err = g.Start(cmd.SysProcAttr, cmd.Start)
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(line)
}

func gone(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return
		}
		if state := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[0]; state == "Z" || state == "X" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d lives", pid)
		}
	}
}

// What was forked into a session of its own, and what is stopped, is ended with
// the rest.
func TestEnd(t *testing.T) {
	each(t, func(t *testing.T, without string) {
		tree := open(t, without)
		g, err := tree.Make("a")
		if err != nil {
			t.Fatal(err)
		}
		other, err := tree.Make("b")
		if err != nil {
			t.Fatal(err)
		}
		cmd, line := start(t, g, "setsid sh -c 'echo $$; exec sleep 3600' & wait")
		bystander, _ := start(t, other, "echo; exec sleep 3600")
		forked, err := strconv.Atoi(line)
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range []int{cmd.Process.Pid, forked} {
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
		}
		if err := g.End(); err != nil {
			t.Fatal(err)
		}
		gone(t, cmd.Process.Pid)
		gone(t, forked)
		if err := unix.Kill(bystander.Process.Pid, 0); err != nil {
			t.Errorf("the other group: %v", err)
		}
		if err := tree.KillAll(); err != nil {
			t.Fatal(err)
		}
		gone(t, bystander.Process.Pid)
		if err := other.End(); err != nil {
			t.Fatal(err)
		}
	})
}

// Whoever takes up the tree of a guard that is gone, or cleans up, ends its guests; a second
// one of the same name touches nothing.
func TestSweep(t *testing.T) {
	each(t, func(t *testing.T, without string) {
		tree := open(t, without)
		g, err := tree.Make("a")
		if err != nil {
			t.Fatal(err)
		}
		cmd, _ := start(t, g, "echo; exec sleep 3600")
		second, err := Open(Options{Name: treeName(t), Mounts: mountsWithout(t, without)})
		if err != nil {
			t.Fatal(err)
		}
		second.Close()
		if err := unix.Kill(cmd.Process.Pid, 0); err != nil {
			t.Fatalf("the second guard of this name ended the guests of the first: %v", err)
		}
		if second.anyDir() == tree.anyDir() {
			t.Error("both have the same groups")
		}
		_ = tree.lock.Close() // the guard is gone
		if without == "" {
			if err := Clean(treeName(t)); err != nil {
				t.Fatal(err)
			}
			gone(t, cmd.Process.Pid)
			if isDir(tree.anyDir()) {
				t.Error("its groups are still there")
			}
			return
		}
		third, err := Open(Options{Name: treeName(t), Mounts: mountsWithout(t, without)})
		if err != nil {
			t.Fatal(err)
		}
		defer third.Close()
		gone(t, cmd.Process.Pid)
	})
}

// The limits that the kernel shows are those that were set.
func TestSet(t *testing.T) {
	each(t, func(t *testing.T, without string) {
		tree := open(t, without)
		if !tree.cpu || !tree.memory {
			t.Skip("not all limits can be set here: ", tree.Describe())
		}
		g, err := tree.Make("a")
		if err != nil {
			t.Fatal(err)
		}
		defer g.End()
		for _, l := range []Limits{{CPUPercent: 50, CPUWeight: 10, MemoryBytes: 64 << 20}, {}} {
			if err := g.Set(l); err != nil {
				t.Fatal(err)
			}
			for _, f := range limitFiles(l, tree.dirs, true, true) {
				got, err := os.ReadFile(filepath.Join(f.dir, g.name, f.name))
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.TrimSpace(string(got)); got != f.value && f.value != "-1" {
					t.Errorf("%s is %s, want %s", f.name, got, f.value)
				}
			}
		}
	})
}

func TestNone(t *testing.T) {
	tree, err := Open(Options{Name: treeName(t), Mounts: "nothing", Self: "0::/\n"})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if tree.Usable() || !strings.HasPrefix(tree.Describe(), "process groups") {
		t.Errorf("%s", tree.Describe())
	}
	if err := tree.KillAll(); err != nil {
		t.Error(err)
	}
}
